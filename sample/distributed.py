"""One process alone, or one of many under torchrun: `with distributed() as env: ...`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from configs import UserError, cli
from models.hardware import local_device

T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """This process among the others, and the device it works on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for every process."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, on each."""
        shares: list[Any] = [items] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(shares, items)
        return [item for share in shares for item in share]

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first process, on every process; a `UserError` there is one everywhere."""
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
def distributed(timeout: timedelta = timedelta(minutes=30)) -> Iterator[Environment]:
    """Joins the process group that torchrun started (nccl on CUDA, gloo on a CPU), or stands alone without one.

    A process that raises leaves at once: it neither waits for the others nor takes the group apart with them, so
    torchrun sees it die and ends the rest.

    Args:
        timeout: how long a process waits for another before it gives up.
    """
    world_size, device = cli.world_size(), local_device()
    if world_size > 1:
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    environment = Environment(cli.rank(), world_size, device)
    yield environment
    environment.barrier()
    if world_size > 1:
        dist.destroy_process_group()
