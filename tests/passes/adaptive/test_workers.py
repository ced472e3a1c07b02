"""Several processes train one model: played by threads, with a real mean over them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.passes.adaptive.test_acm import dense, job
from thresher.compiler import workers
from thresher.passes.adaptive import train
from thresher.passes.adaptive.job import Distilled

WORKERS = 2


class Threads:
    """Stands for ``torch.distributed``."""

    def __init__(self) -> None:
        self.own = threading.local()
        self.barrier = threading.Barrier(WORKERS, timeout=60)
        self.told: list[Tensor | None] = [None] * WORKERS

    def rank(self) -> int:
        number: int = self.own.rank
        return number

    def mean(self, value: Tensor) -> Tensor:
        self.told[self.rank()] = value.detach().clone()
        self.barrier.wait()
        told = [each for each in self.told if each is not None]
        value.detach().copy_(torch.stack(told).mean(0))
        self.barrier.wait()
        return value

    def each(self, work: Callable[[], Distilled]) -> list[Distilled]:
        """What every worker gets."""

        def begin(rank: int) -> Distilled:
            self.own.rank = rank
            try:
                return work()
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(begin, range(WORKERS)))


def test_all_workers_come_to_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each sees other data, at first and in every step."""
    threads = Threads()
    monkeypatch.setattr(workers, "count", lambda: WORKERS)
    monkeypatch.setattr(workers, "rank", threads.rank)
    monkeypatch.setattr(workers, "mean", threads.mean)
    monkeypatch.setattr(workers, "joined", nullcontext)
    dense()
    first, second = threads.each(lambda: train.distil(job()))
    assert first.tilt == second.tilt
    assert first.history == second.history
    for ours, theirs in zip(first.modules, second.modules, strict=True):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), name
