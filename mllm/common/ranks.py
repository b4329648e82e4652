"""Several processes that share one piece of work, as torchrun or DeepSpeed starts them; alone, nothing here waits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # one rank may still be loading a large model


@contextmanager
def joined() -> Iterator[None]:
    """Meets the other ranks that the environment tells of, and parts from them afterwards."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)  # plain objects are exchanged, whatever device computes
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """The number of ranks that have met."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's place among the ranks that have met: below `size()`, so that rows can be shared out by both."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is rank 0: the one that prints and writes. Also before the ranks have met."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def summed(value: Tensor) -> Tensor:
    """The sum over ranks, in place. Under NCCL the tensor must lie on the rank's GPU."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def own_device() -> str:
    """A GPU a rank where there are GPUs."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def shared(value: T | None) -> T:
    """The first rank's value, on every rank."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: T) -> list[T] | None:
    """Every rank's value in order, on the first rank; None on the others."""
    if size() == 1:
        return [value]
    values: list[T] | None = [value] * size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def all_gathered(value: T) -> list[T]:
    """Every rank's value in order, on every rank."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values
