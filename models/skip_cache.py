"""Skip-Cache (arXiv:2411.17616): most steps run only the outer layers and reuse the deep feature of an earlier step.

With depth b, the first b and the last b of L layers are the outer layers. The deep feature is the output of layer
L-b-1, the one tensor that the last b layers need from the layers between. The long skips carry the fresh outputs of
the first b layers to the last b.

    full step:    embed, layers 0 ... L-b-1, keep the deep feature, layers L-b ... L-1, unembed
    cached step:  embed, layers 0 ... b-1 for their skips, the kept deep feature, layers L-b ... L-1, unembed

Where the skips do not reach (a Latte without them, or b > num_skips), the fresh output of the first b layers would be
lost. There the change over the layers between is kept instead, and added to it, as in Delta-DiT (arXiv:2406.01125).

`SkipCache` runs the steps. A plan, a list made before the run, says which of them run in full. Beyond the paper, the
deep feature can be forecast from those of several full steps, as TaylorSeer (arXiv:2503.06923) does in every block.
Letters: B batch, F frames, T tokens of a frame, D width, L layers.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from configs import UserError
from models.latte import Latte


def interval_plan(timesteps: Sequence[int], interval: int, start: int = 900, stop: int = 50) -> list[bool]:
    """Returns the paper's plan: for each step, whether it runs in full.

    Args:
        timesteps: original timesteps, 0 ... 999 (of a flow 1000 s), in sampling order, from noise to clean.
        interval: N; every N-th step is full. 1: all steps are full.
        start: steps with t >= start are full.
        stop: after a step with t < stop, the cache is emptied and the next step, number 0 again, is full.
    """
    if interval < 1:
        raise UserError(f"cache.interval: {interval} is less than 1 (1: no cache, 2: every second step in full)")
    plan, count = [], 0  # count of steps since the cache was empty
    for t in timesteps:
        plan.append(count % interval == 0 or t >= start)
        count = 0 if t < stop else count + 1
    return plan


def explicit_plan(full_steps: Sequence[int], num_steps: int) -> list[bool]:
    """Returns the plan in which the steps of these numbers, 0 ... `num_steps` - 1 in sampling order, run in full."""
    if list(full_steps) != sorted({0, *full_steps}):
        raise UserError(f"cache.full_steps: {list(full_steps)} must begin with 0, which has nothing to reuse, and rise")
    if full_steps[-1] >= num_steps:
        raise UserError(f"cache.full_steps: {full_steps[-1]} is no step of {num_steps}, 0 ... {num_steps - 1}")
    return [step in full_steps for step in range(num_steps)]


def forecast_weights(plan: Sequence[bool], order: int) -> list[list[float]]:
    """Returns, for each step, the weights of the last full steps' deep features, newest first; [] for a full step.

    A cached step uses the weighted sum of these features. It is the value at the cached step of the polynomial in the
    step number through the last `order` + 1 full steps (or all of them, if there were fewer). The weights are those of
    Lagrange's formula and sum to 1; order 0 gives [1], the paper's reuse.
    """
    if not 0 <= order <= 3:
        raise UserError(f"cache.order: {order} is outside 0 ... 3 (0: reuse, 1: linear forecast, 2: quadratic)")
    weights: list[list[float]] = []
    full: deque[int] = deque(maxlen=order + 1)  # step numbers of the last full steps, newest first
    for step, runs_in_full in enumerate(plan):
        if runs_in_full:
            full.appendleft(step)
            weights.append([])
        else:
            weights.append(lagrange_weights(step, full))
    return weights


def lagrange_weights(step: int, known: Sequence[int]) -> list[float]:
    """Returns the weights of values at the steps `known` in the value at `step` of the polynomial through them."""
    return [math.prod((step - j) / (i - j) for j in known if j != i) for i in known]


def full_step(model: Latte, depth: int, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs all layers; returns the model's output (B, F, 2C, H, W) and what is kept of the step (B, F, T, D)."""
    x, c = model.embed(x, t, y)
    skips: list[Tensor] = []
    deep, kept = deep_feature(model, depth, x, c, skips)
    x = model.run(range(model.num_layers - depth, model.num_layers), deep, c, skips)
    return model.unembed(x, c), kept


def deep_feature(model: Latte, depth: int, x: Tensor, c: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Runs all layers but the last `depth` on embedded x; returns their output and what is kept of it, (B, F, T, D)."""
    head = model.run(range(depth), x, c, skips)
    deep = model.run(range(depth, model.num_layers - depth), head, c, skips)
    return deep, deep if depth <= model.num_skips else deep - head


def cached_step(model: Latte, depth: int, x: Tensor, t: Tensor, y: Tensor | None, kept: Tensor) -> Tensor:
    """Runs `depth` outer layers at each end, around `kept` of a full step; returns the output (B, F, 2C, H, W)."""
    x, c = model.embed(x, t, y)
    skips: list[Tensor] = []
    head = model.run(range(depth), x, c, skips)  # with skip branches, only the skips are used
    deep = kept if depth <= model.num_skips else head + kept
    del head  # its memory serves the last layers
    x = model.run(range(model.num_layers - depth, model.num_layers), deep, c, skips)
    return model.unembed(x, c)


class StaleFeatures(nn.Module):
    """A Latte in training that computes its deep feature at timesteps of its own, as a cached step gets it.

    Where both timesteps of a clip are equal, so are its output and gradient to the Latte's.
    """

    def __init__(self, model: Latte, depth: int = 1):
        super().__init__()
        check_cache_depth(model.num_layers, depth)
        self.model, self.depth = model, depth

    def forward(self, x: Tensor, t: Tensor, x_deep: Tensor, t_deep: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction for x (B, F, C, H, W) at t (B,) around the deep feature of x_deep at t_deep, shaped alike."""
        _, kept = deep_feature(self.model, self.depth, *self.model.embed(x_deep, t_deep, y), [])
        return cached_step(self.model, self.depth, x, t, y, kept)


class SkipCache:
    """A denoiser for one sampling run of `len(plan)` steps, called like the model.

    It counts its calls and keeps the last deep features, so every run needs a new one.

    Args:
        model: a Latte.
        plan: for each step, whether it runs in full; the first step must.
        depth: b, the number of outer layers at each end.
        order: of the forecast, see `forecast_weights`.
        steps: `(full_step, cached_step)` or their compiled forms.
        weights: for each step, those of the last full steps' deep features, newest first; None: as `order` says.
    """

    def __init__(
        self,
        model: Latte,
        plan: Sequence[bool],
        depth: int = 1,
        order: int = 0,
        steps: tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]] = (full_step, cached_step),
        weights: Sequence[Sequence[float]] | None = None,
    ):
        check_cache_depth(model.num_layers, depth)
        assert plan[0], "the first step has nothing to reuse"
        self.model, self.depth = model, depth
        self.full_step, self.cached_step = steps
        weights = forecast_weights(plan, order) if weights is None else weights
        self.weights = deque(weights)  # of the steps to come
        self.deep: deque[Tensor] = deque(maxlen=max(1, *map(len, weights)))  # (B, F, T, D) each, newest first

    @property
    def steps_left(self) -> int:
        """The number of steps to come; a sampling loop checks that it runs as many."""
        return len(self.weights)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, F, C, H, W), t (B,), y (B,) -> (B, F, 2C, H, W)."""
        if not self.weights:
            raise UserError("this SkipCache has run all steps of its plan: make a new one for each run")
        weights = self.weights.popleft()
        if not weights:  # a full step
            out, deep = self.full_step(self.model, self.depth, x, t, y)
            self.deep.appendleft(deep)
            return out
        deep = self.deep[0]
        if tuple(weights) != (1,):  # (1,) means reuse: the feature as it is, without a copy
            forecast = sum(weight * each.float() for weight, each in zip(weights, self.deep, strict=False))
            deep = forecast.to(deep.dtype)
        return self.cached_step(self.model, self.depth, x, t, y, deep)


def check_cache_depth(num_layers: int, depth: int) -> None:
    """Raises UserError unless a model of `num_layers` layers has `depth` of them at each end."""
    if not 1 <= depth <= num_layers // 2:
        raise UserError(f"cache.depth: {depth} is outside 1 ... {num_layers // 2}, half of the model's layers")


def compile_steps(backend: str = "inductor") -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """Returns `(full_step, cached_step)`, each compiled as one graph; the plan is not part of a graph."""
    compiled = partial(torch.compile, fullgraph=True, backend=backend)
    return compiled(full_step), compiled(cached_step)
