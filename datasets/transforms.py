"""From frames as read to the model's input, the same for every frame of a clip."""

import torch
from torchvision.transforms.v2 import functional as F


def fit(frames: torch.Tensor, size: int, flip: bool) -> torch.Tensor:
    """Resize the short edge, crop the centre, flip, scale: (..., 3, H, W) uint8 -> (..., 3, size, size) in [-1, 1]."""
    frames = F.resize(frames, [size], F.InterpolationMode.BILINEAR, antialias=True)  # (..., 3, size, >= size) or turned
    frames = F.center_crop(frames, [size, size])
    if flip:
        frames = F.horizontal_flip(frames)
    return F.to_dtype(frames, torch.float32, scale=True) * 2 - 1
