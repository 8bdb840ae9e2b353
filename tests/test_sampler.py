"""The order of the data: each epoch a permutation, the same at any number of ranks, resumed at any position."""

from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datasets import ClipSampler


def steps(num_steps: int, *args, **kwargs) -> list[list[tuple[int, int]]]:
    return list(islice(ClipSampler(*args, **kwargs), num_steps))


def test_every_epoch_shows_every_clip_once_in_its_own_order():
    keys = [key for batch in steps(12, 10, 5, seed=3) for key in batch]  # 6 epochs of 10
    for epoch in range(6):
        assert sorted(index for e, index in keys if e == epoch) == list(range(10))
    orders = {tuple(index for e, index in keys if e == epoch) for epoch in range(6)}
    assert len(orders) == 6
    assert keys == [key for batch in steps(12, 10, 5, seed=3) for key in batch]
    assert keys != [key for batch in steps(12, 10, 5, seed=4) for key in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_global_batch_in_contiguous_parts(world_size):
    """The parts of all ranks, one behind the other, are the batch of a single process."""
    single = steps(7, 10, 6, seed=1)
    ranks = [steps(7, 10, 6, rank, world_size, seed=1) for rank in range(world_size)]
    for step, whole in enumerate(single):
        assert [key for rank in range(world_size) for key in ranks[rank][step]] == whole


@pytest.mark.parametrize("consumed_steps", [1, 4, 9])
def test_a_run_resumes_where_it_stopped(consumed_steps):
    whole = steps(20, 13, 4, 1, 2, seed=5)
    rest = steps(20 - consumed_steps, 13, 4, 1, 2, seed=5, start=4 * consumed_steps)
    assert rest == whole[consumed_steps:]


def test_another_world_size_and_batch_go_on_from_the_same_position():
    """The sequence of samples belongs to the run, not to the way it is cut into batches."""
    flat = [key for batch in steps(10, 7, 6, seed=2) for key in batch]
    assert [key for batch in steps(9, 7, 4, seed=2, start=24) for key in batch] == flat[24:60]


def test_a_set_smaller_than_a_batch_fills_it_from_several_epochs():
    batch = steps(1, 3, 8)[0]
    assert Counter(epoch for epoch, _ in batch) == {0: 3, 1: 3, 2: 2}


class Keys(Dataset):
    """Items that are their keys."""

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return torch.tensor(key)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_the_batch_sampler_of_a_data_loader(workers):
    loader = DataLoader(Keys(), batch_sampler=ClipSampler(5, 4, seed=1), num_workers=workers)
    batches = [[tuple(key) for key in batch.tolist()] for batch in islice(loader, 6)]
    assert batches == steps(6, 5, 4, seed=1)
