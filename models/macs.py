"""Size and cost of a model, from its dimensions: parameters, and multiply-adds (MACs) of a step.

MACs are those of all matrix products and convolutions, including those in attention: half of torch's flop count, to
which the tests hold these formulas. They take no time, where counting on the meta device takes a second.
The paper omits the products in attention, and counts the conditioning once for every frame and token.
Letters: B blocks, D width, H inner width of an MLP, F frames, T tokens of a frame, P values of a token.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from configs import ModelOptions
from models import model_dimensions
from models.layers import NUM_FREQUENCIES


@dataclass(frozen=True)
class StepMacs:
    """MACs of one step on one sample, without guidance (which doubles them)."""

    full: int
    cached: int


class _Sizes(NamedTuple):
    """Dimensions of a model, named as in the formulas."""

    B: int
    D: int
    H: int
    F: int
    T: int
    P: int
    outputs: int  # values of a token of the output
    num_skips: int


def _sizes(dimensions: dict[str, Any]) -> _Sizes:
    d = dimensions
    P = d["in_channels"] * d["patch_size"] ** 2
    return _Sizes(
        B=d["depth"],
        D=d["hidden_size"],
        H=int(d["hidden_size"] * d["mlp_ratio"]),
        F=d["num_frames"],
        T=(d["input_size"] // d["patch_size"]) ** 2,
        P=P,
        outputs=2 * P if d["learn_sigma"] else P,
        num_skips=d["num_skips"],
    )


def step_macs(options: ModelOptions, depth: int = 1, stills: int = 0) -> StepMacs:
    """Returns the MACs of a full step, and of a cached step with `depth` outer layers, of the model of `options`.

    Args:
        depth: 0: nothing runs on a cached step.
        stills: still images of a clip, in training: temporal blocks pass them by, and each has a label of its own.
    """
    dimensions = model_dimensions(options)
    B, D, H, F, T, P, outputs, num_skips = _sizes(dimensions)
    frames = F + stills
    rows = frames if stills and dimensions["num_classes"] is not None else 1  # of conditioning, in spatial blocks
    dense = 4 * D * D + 2 * D * H  # of a token: qkv, projection and MLP
    spatial = 6 * D * D * rows + frames * T * (dense + 2 * T * D)  # modulation; dense; q k' and a v
    temporal = 6 * D * D + F * T * (dense + 2 * F * D)
    layer, merge = spatial + temporal, frames * T * 2 * D * D
    ends = frames * T * (P + outputs) * D + NUM_FREQUENCIES * D + D * D + 2 * D * D * rows
    return StepMacs(
        full=ends + B // 2 * layer + num_skips * merge,
        cached=ends + 2 * depth * layer + min(depth, num_skips) * merge if depth else 0,
    )


def count_parameters(options: ModelOptions) -> int:
    """Returns the number of parameters of the model of `options`, with the position embeddings."""
    dimensions = model_dimensions(options)
    B, D, H, F, T, P, outputs, num_skips = _sizes(dimensions)

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    block = linear(D, 3 * D) + linear(D, D) + linear(D, H) + linear(H, D) + linear(D, 6 * D)
    merge = 2 * 2 * D + linear(2 * D, D)  # norm, linear
    embedders = linear(P, D) + linear(NUM_FREQUENCIES, D) + linear(D, D) + T * D + F * D
    if dimensions["num_classes"] is not None:
        embedders += (dimensions["num_classes"] + (dimensions["class_dropout_prob"] > 0)) * D
    return embedders + B * block + num_skips * merge + linear(D, outputs) + linear(D, 2 * D)


def readable(macs: int) -> str:
    """Returns MACs with a unit: 1938926813184 -> 1.94 TMACs."""
    size, unit = next(
        (size, unit) for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1, "")) if macs >= size
    )
    return f"{macs / size:.3g} {unit}MACs"
