"""The order of the data: endless, keyed by (seed, epoch), the same at any number of ranks and from any position."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


class ClipSampler(Sampler[list[tuple[int, int]]]):
    """A rank's batches of keys (epoch, index), for ever; a DataLoader's `batch_sampler`.

    Sample number n of the whole run is entry n % dataset_size of the permutation of epoch n // dataset_size, so epochs
    follow each other without a gap, within a batch if need be. A step takes the next `global_batch_size` numbers, of
    which rank r has the r-th contiguous share. `start` is the number of samples that all ranks have consumed so far.
    """

    def __init__(
        self,
        dataset_size: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start: int = 0,
    ):
        assert dataset_size > 0 and global_batch_size % world_size == 0
        self.dataset_size, self.global_batch_size = dataset_size, global_batch_size
        self.rank, self.local_batch_size = rank, global_batch_size // world_size
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((self.seed, epoch)).permutation(self.dataset_size)
        )
        first = self.start + self.rank * self.local_batch_size
        while True:
            numbers = (divmod(n, self.dataset_size) for n in range(first, first + self.local_batch_size))
            yield [(epoch, int(permutation(epoch)[place])) for epoch, place in numbers]
            first += self.global_batch_size
