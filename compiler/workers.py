"""Several processes on one job, as ``torchrun`` starts them: who am I, and means over all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def count() -> int:
    """Processes of this job; 1 outside ``torchrun``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes of this job for as long as the block lasts."""
    if count() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def generator(number: int) -> torch.Generator:
    """Random numbers of one step of a training, others in every process."""
    return torch.Generator().manual_seed(number * count() + rank())


def mean(value: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes, in place."""
    if count() > 1:
        dist.all_reduce(value)
        value /= count()
    return value
