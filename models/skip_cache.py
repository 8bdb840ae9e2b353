"""Skip-Cache: most steps run only the outer layers around the deep feature of an earlier step (arXiv:2411.17616).

Mechanism and policy are apart: `SkipCache` runs a step in full or from the cache, and a plan, a list over the steps
made before the run, says which. Beyond the paper, the deep feature can be forecast from those of several full steps,
as TaylorSeer (arXiv:2503.06923) does inside every block; here it is one tensor of the whole model.
Letters: B batch, F frames, T tokens of a frame, D width, L layers.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs import UserError
from models.latte import Latte


def interval_plan(timesteps: Sequence[int], interval: int, start: int = 900, stop: int = 50) -> list[bool]:
    """The paper's plan: which steps run in full.

    Args:
        timesteps: original timesteps, 0 ... 999, in sampling order, from noise to clean.
        interval: N; every N-th step is full. 1: all are.
        start: steps with t >= start are full.
        stop: after a step with t < stop the cache is emptied and the count of steps starts anew.

    Returns:
        One bool a step; True: run in full.
    """
    if interval < 1:
        raise UserError(f"cache.interval: {interval} is less than 1 (1: no cache, 2: every second step in full)")
    plan, count, empty = [], 0, True
    for t in timesteps:
        plan.append(empty or count % interval == 0 or t >= start)
        empty, count = (True, 0) if t < stop else (False, count + 1)
    return plan


def forecast_weights(plan: Sequence[bool], order: int) -> list[list[float]]:
    """How a cached step's deep feature is made of those of the full steps before it.

    The polynomial in the number of the step through the last `order` + 1 full steps (fewer where the run had fewer),
    continued to the cached step: Lagrange's weights. They sum to 1; order 0 is the paper's reuse.

    Returns:
        For each step the weights of the last full steps, newest first; none for a full step.
    """
    if not 0 <= order <= 3:
        raise UserError(f"cache.order: {order} is outside 0 ... 3 (0: reuse, 1: linear forecast, 2: quadratic)")
    weights: list[list[float]] = []
    full: deque[int] = deque(maxlen=order + 1)  # numbers of the last full steps, newest first
    for step, runs_in_full in enumerate(plan):
        if runs_in_full:
            full.appendleft(step)
            weights.append([])
        else:
            weights.append([math.prod((step - j) / (i - j) for j in full if j != i) for i in full])
    return weights


def full_step(model: Latte, depth: int, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """All layers. Returns the model's output and the feature (B, F, T, D) that enters the outer tail."""
    x, c = model.embed(x, t, y)
    skips: list[Tensor] = []
    deep = model.run(range(model.num_layers - depth), x, c, skips)
    x = model.run(range(model.num_layers - depth, model.num_layers), deep, c, skips)
    return model.unembed(x, c), deep


def cached_step(model: Latte, depth: int, x: Tensor, t: Tensor, y: Tensor | None, deep: Tensor) -> Tensor:
    """The `depth` outer layers at each end, around `deep` of an earlier step."""
    x, c = model.embed(x, t, y)
    skips: list[Tensor] = []
    model.run(range(depth), x, c, skips)  # only its skips are used
    x = model.run(range(model.num_layers - depth, model.num_layers), deep, c, skips)
    return model.unembed(x, c)


class SkipCache:
    """A denoiser for one sampling run of `len(plan)` steps, called like the model.

    Its state, the step number and the deep features, ends with the run: make a new one for the next.

    Args:
        model: a Latte with at least `depth` skips.
        plan: for each step, whether it runs in full; the first must.
        depth: b, outer layers at each end that run on every step.
        order: of the forecast, see `forecast_weights`; as many deep features more are kept.
        steps: `(full_step, cached_step)` or their compiled forms.
    """

    def __init__(
        self,
        model: Latte,
        plan: Sequence[bool],
        depth: int = 1,
        order: int = 0,
        steps: tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]] = (full_step, cached_step),
    ):
        check_cache_depth(model.num_skips, depth)
        assert plan[0], "the first step has nothing to reuse"
        self.model, self.depth = model, depth
        self.full, self.cached = steps
        self.weights = iter(forecast_weights(plan, order))
        self.deep: deque[Tensor] = deque(maxlen=order + 1)  # (B, F, T, D) each, newest first

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, F, C, H, W), t (B,), y (B,) -> (B, F, 2C, H, W)."""
        weights = next(self.weights)
        if not weights:
            out, deep = self.full(self.model, self.depth, x, t, y)
            self.deep.appendleft(deep)
            return out
        deep = self.deep[0]
        if len(weights) > 1:
            forecast = sum(weight * each.float() for weight, each in zip(weights, self.deep, strict=True))
            deep = forecast.to(deep.dtype)
        return self.cached(self.model, self.depth, x, t, y, deep)


def check_cache_depth(num_skips: int, depth: int) -> None:
    """Raise unless `depth` outer layers each have a skip branch that carries the fresh input around the cached ones."""
    if num_skips == 0:
        raise UserError(
            "Skip-Cache needs long skip branches, and this model has none: choose a model with `skip` in its name"
        )
    if not 1 <= depth <= num_skips:
        raise UserError(f"cache.depth: {depth} is outside 1 ... {num_skips}, the model's number of skip branches")


def compile_steps() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """`(full_step, cached_step)`, each compiled as one graph; the plan stays outside."""
    return torch.compile(full_step, fullgraph=True), torch.compile(cached_step, fullgraph=True)
