"""The demo judge's classifier: a small network, trained on real clips and on spoiled ones that belong to no class.

Letters: N clips of a set, B of a batch, F frames, S pixels of a side, K classes, D features.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange


def create_classifier(num_classes: int, widths: Sequence[int] = (16, 32, 64, 128)) -> nn.Sequential:
    """A (2+1)D convolutional network, (B, 3, F, S, S) -> features (B, D) -> logits (B, K + 1), the last of no class."""
    body = nn.Sequential()
    for before, width in zip([3, *widths], widths, strict=False):
        space = nn.Conv3d(before, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        time = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))
        body.extend([space, nn.GroupNorm(8, width), nn.ReLU(), time, nn.GroupNorm(8, width), nn.ReLU()])
    body.extend([nn.AdaptiveAvgPool3d(1), nn.Flatten()])
    return nn.Sequential(body, nn.Linear(widths[-1], num_classes + 1))


def blur(x: Tensor, size: int) -> Tensor:
    """`x` (B, F, 3, S, S) with squares of `size` pixels averaged, then interpolated."""
    return F.interpolate(F.avg_pool3d(x, (1, size, size)), size=x.shape[2:], mode="trilinear")


def augment(x: Tensor) -> Tensor:
    """`x` (B, F, 3, S, S) with another place, sharpness, colour, noise, a part hidden: none may decide the class."""
    B, num_frames, _, S, _ = x.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(B, *shape)

    zoom, shift = uniform(0.7, 1, 1), uniform(-1, 1, 2)  # of a crop inside the frame
    theta = torch.cat([torch.diag_embed(zoom.expand(-1, 2)), ((1 - zoom) * shift)[..., None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(theta, [B, 3, S, S], align_corners=False).repeat_interleave(num_frames, 0)  # (B F, S, S, 2)
    x = F.grid_sample(x.flatten(0, 1), grid, padding_mode="border", align_corners=False).unflatten(0, (B, num_frames))
    x = x.lerp(blur(x, 2), uniform(0, 1, 1, 1, 1, 1))
    x = x * uniform(0.6, 1.4, 1, 3, 1, 1) + uniform(-0.3, 0.3, 1, 3, 1, 1)
    x = x + uniform(0, 0.15, 1, 1, 1, 1) * torch.randn_like(x)
    rows, columns = ((torch.arange(S) - uniform(0, S, 1)).abs() < S / 6 for _ in range(2))  # (B, S)
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None, None], 0)  # a grey square, S / 3 wide


def spoil(x: Tensor) -> Tensor:
    """Clips of no class, made from x (B, F, 3, S, S): a quarter each in disorder, blurred, two in one, under noise."""
    rows, columns = (torch.arange(x.shape[-1]).view(4, -1)[torch.randperm(4)].flatten() for _ in range(2))
    disorder = x[:, :, :, rows][..., columns]  # four rows and four columns of tiles, shuffled
    noise = 0.3 * x + 0.5 * torch.randn_like(x)
    kinds = [disorder, blur(x, 8), (x + x.roll(1, 0)) / 2, noise]
    return torch.cat([kind[i :: len(kinds)] for i, kind in enumerate(kinds)])


def train_classifier(
    draw: Callable[[Tensor], Tensor],
    labels: Tensor,
    num_classes: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> nn.Sequential:
    """The classifier, trained on random windows of clips with `labels` (N,). Everything random follows from `seed`.

    Args:
        draw: from places (N,) in [0, 1) to a window of each clip there, (N, F, 3, S, S) in [-1, 1].
    """
    torch.manual_seed(seed)
    model = create_classifier(num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * math.ceil(len(labels) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in trange(epochs, desc="training the judge", unit="epoch"):
        x = draw(torch.rand(len(labels)))  # (N, F, 3, S, S)
        for batch in torch.randperm(len(x)).split(batch_size):
            y = augment(x[batch])
            none = spoil(y[::2])
            logits = model(torch.cat([y, none]).transpose(1, 2))  # (1.5 B, K + 1)
            target = torch.cat([labels[batch], torch.full([len(none)], num_classes)])
            F.cross_entropy(logits, target, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model
