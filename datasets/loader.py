"""Batches of clips for a training loop, and a limit on the share of unusable files."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from configs import UserError
from datasets.clips import summary
from datasets.sampler import ClipSampler

MIN_JUDGED = 1000  # files drawn before max_bad_fraction applies (or one epoch of a smaller data set)

logger = logging.getLogger(__name__)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the batch of items: video (B, F+K, 3, S, S), label (B,), name, skipped, [image_labels (B, K)].

    Raises:
        UserError: clips differ in shape, as latents of several sizes do.
    """
    first = items[0]
    for item in items:
        if item["video"].shape != first["video"].shape:
            shapes = [f"{each['name']} {list(each['video'].shape)}" for each in (first, item)]
            raise UserError(f"clips differ in shape: {', '.join(shapes)}; remove or encode again the wrong one")
    batch = {
        "video": torch.stack([item["video"] for item in items]),
        "label": torch.tensor([item["label"] for item in items]),
        "name": [item["name"] for item in items],
        "skipped": [file for item in items for file in item["skipped"]],
    }
    if "image_labels" in items[0]:
        batch["image_labels"] = torch.stack([item["image_labels"] for item in items])
    return batch


class _Batches(Dataset):
    """Maps lists of keys to batches, or to the UserError raised: a worker would add its traceback to an exception."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, keys: list[tuple[int, int]]) -> dict[str, Any] | UserError:
        try:
            return collate([self.dataset[key] for key in keys])
        except UserError as error:
            return error


def load_batches(
    dataset: Dataset,
    sampler: ClipSampler,
    num_workers: int = 0,
    max_bad_fraction: float = 0.1,
    say: Callable[[str], object] = logger.warning,
    **loader_options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields batches (see `collate`) of `dataset` in the order of `sampler`, without end.

    Args:
        dataset: one of `get_dataset`.
        max_bad_fraction: the largest share of unusable files among those drawn.
        say: called with a message for each unusable file, once.
        loader_options: for the DataLoader.

    Raises:
        UserError: the share of unusable files is larger; the error names them.
    """
    loader = DataLoader(
        _Batches(dataset),
        sampler=sampler,
        batch_size=None,  # the sampler's keys are whole batches
        num_workers=num_workers,
        generator=torch.Generator(),  # otherwise seeding the workers would advance the training's generator
        **loader_options,
    )
    drawn = bad = dataset.num_unreadable  # each such folder counts as an unusable file
    named = {}
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        skipped = batch["skipped"]
        for file in skipped:
            if file not in named:
                named[file] = None
                say(f"skipped {file}; unusable files so far: {len(named)}")
        bad += len(skipped)
        drawn += len(skipped) + batch["label"].numel() + batch.get("image_labels", torch.empty(0)).numel()
        if drawn >= min(len(dataset), MIN_JUDGED) and bad > max_bad_fraction * drawn:
            raise UserError(
                f"{bad} of {drawn} files drawn cannot be used, more than max_bad_fraction={max_bad_fraction}: "
                f"{summary(list(named)) or 'folders that cannot be read'}"
            )
        yield batch
