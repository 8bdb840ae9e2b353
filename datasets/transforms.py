"""From frames as read to the model's input, the same for every frame of a clip."""

import torch
from torchvision.transforms.v2 import functional as F


def fit(frames: torch.Tensor, size: int, flip: bool) -> torch.Tensor:
    """`square` in the model's range: (..., 3, H, W) uint8 -> (..., 3, size, size) float in [-1, 1]."""
    return F.to_dtype(square(frames, size, flip), torch.float32, scale=True).mul_(2).sub_(1)


def square(frames: torch.Tensor, size: int, flip: bool, resize_filter: str = "bilinear") -> torch.Tensor:
    """Resize the short edge, crop the centre, flip: (..., 3, H, W) -> (..., 3, size, size), both uint8."""
    mode = F.InterpolationMode(resize_filter)
    frames = F.resize(frames, [size], mode, antialias=True)  # (..., 3, size, >= size) or turned
    frames = F.center_crop(frames, [size, size])
    return F.horizontal_flip(frames) if flip else frames
