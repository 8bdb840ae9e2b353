"""The process group of torchrun, or a single process without it: `with distributed() as env: ...`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from configs import UserError, cli
from models.hardware import local_device

PATIENCE = timedelta(days=1)  # for other processes: one may finish long after the rest

T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """The rank and the device of this process, and communication with the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, items: list[T]) -> list[T]:
        """Returns the items of all processes, in the order of their ranks, on every process."""
        shares: list[Any] = [items] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(shares, items)
        return [item for share in shares for item in share]

    def from_first(self, function: Callable[[], T]) -> T:
        """Calls `function` on the first process; returns its result, or raises its `UserError`, on every process."""
        result: list[Any] = [None]
        if self.is_main:
            try:
                result = [function()]
            except UserError as error:
                result = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(result, device=self.device)
        if isinstance(result[0], UserError):
            raise result[0]
        return result[0]


@contextmanager
def distributed() -> Iterator[Environment]:
    """Joins the process group of torchrun, if there is one: nccl on CUDA, gloo on a CPU.

    If the block raises, the process ends without waiting for the others; torchrun then ends them.

    """
    world_size, device = cli.world_size(), local_device()
    if world_size > 1:
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=PATIENCE, device_id=bound)
    env = Environment(cli.rank(), world_size, device)
    yield env
    env.barrier()
    if world_size > 1:
        dist.destroy_process_group()
