"""The order of the training data. It depends only on the seed, not on the number of ranks or on interruptions."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


class ClipSampler(Sampler[list[tuple[int, int]]]):
    """Yields one rank's batches of keys (epoch, index), without end.

    Sample n of a run is entry n % dataset_size of the permutation of epoch n // dataset_size, so a batch may contain
    the end of one epoch and the start of the next. A step takes the next `global_batch_size` samples; rank r gets the
    r-th contiguous part of them. `start` is the number of samples that all ranks together have taken before.
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
            yield [(epoch, int(permutation(epoch)[entry])) for epoch, entry in numbers]
            first += self.global_batch_size
