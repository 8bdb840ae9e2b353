"""Classifier-free guidance as a wrapper around any denoiser."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor

from configs import UserError


@dataclass
class Guided:
    """A denoiser with guidance: eps_null + scale (eps_cond - eps_null); Ho & Salimans 2022, eq. 6.

    A call runs `denoiser` once on 2B rows: B with their labels, then B with the null label. Variance channels, if any,
    are those of the labelled rows. With scale = 1 a call runs `denoiser` on B rows and returns its output.

    guided: for each call of one sampling run, whether it is guided; the others run as with scale = 1. Guidance in a
        limited interval of noise: Kynkäänniemi et al. 2024 (arXiv:2404.07724).
    """

    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor]
    scale: float
    null_label: int
    guided: Iterable[bool] = repeat(True)
    _calls: Iterator[bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._calls = iter(self.guided)

    @property
    def steps_left(self) -> int | None:
        """That of a `denoiser` made for one run; None for others."""
        return getattr(self.denoiser, "steps_left", None)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, F, C, H, W), t (B,), y (B,) -> (B, F, C or 2C, H, W), in fp32 when guided."""
        if (guided := next(self._calls, None)) is None:
            raise UserError("this Guided has run all calls of its list `guided`: make a new one for each run")
        if not guided or self.scale == 1:
            return self.denoiser(x, t, y)
        labels = torch.cat([y, torch.full_like(y, self.null_label)])  # (2B,)
        out = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), labels).float()  # scale magnifies rounding errors
        cond, null = out.chunk(2)  # (B, F, C or 2C, H, W) each
        eps_cond, variance = cond.tensor_split([x.shape[-3]], dim=-3)  # C channels; C or 0 channels
        eps_null, _ = null.tensor_split([x.shape[-3]], dim=-3)
        return torch.cat([eps_null + self.scale * (eps_cond - eps_null), variance], dim=-3)
