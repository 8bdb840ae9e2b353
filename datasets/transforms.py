"""The transform from frames of a file to frames of a training item, the same for every frame of a clip."""

import torch


def square(frames: torch.Tensor, size: int, flip: bool, resize_filter: str = "bilinear") -> torch.Tensor:
    """Resizes the short edge, crops the centre and mirrors: (..., 3, H, W) -> (..., 3, size, size), both uint8."""
    from torchvision.transforms.v2 import functional as F  # a second's import, for those that read clips

    mode = F.InterpolationMode(resize_filter)
    frames = F.resize(frames, [size], mode, antialias=True)  # (..., 3, size, >= size), or (..., 3, >= size, size)
    frames = F.center_crop(frames, [size, size])
    return F.horizontal_flip(frames) if flip else frames
