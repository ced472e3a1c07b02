"""Interleaved timing: every candidate in every round, in a new order each time.

What disturbs the machine then disturbs all candidates alike, and ratios are taken within a round.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from thresher.runtime.stats import settled

Call = Callable[[], object]
Clock = Callable[[], float]

FEWEST = 6  # rounds; fewer give no 95 % interval of a median


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Args:
        rounds: visits of every candidate.
        seconds: after this time no further round is begun, once there are six.
        warm_up: most untimed runs of a candidate before the first round.
        sample: shortest time, in seconds, that one visit should take; short runs are repeated.
        seed: of the order of visits.
    """

    rounds: int = 30
    seconds: float = 60.0
    warm_up: int = 30
    sample: float = 0.005
    seed: int = 0


@dataclass(frozen=True)
class Warmth:
    """Result of warming up: runs taken, whether they became steady, and the last median (s)."""

    runs: int
    steady: bool
    seconds: float


def warm_up(call: Call, plan: Plan, clock: Clock) -> Warmth:
    """Run until the last five times agree within 5 %, or the plan's limit is reached."""
    times: list[float] = []
    while len(times) < max(1, plan.warm_up) and not settled(times):
        times.append(_timed(call, 1, clock))
    return Warmth(len(times), settled(times), statistics.median(times[-5:]))


def interleave(
    calls: Sequence[Call],
    warmth: Sequence[Warmth],
    plan: Plan,
    clock: Clock,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Seconds of one run, per candidate and round.

    Each visit begins with one untimed run, so that a candidate's weights are in the caches again
    after another candidate has used them.
    """
    order = list(range(len(calls)))
    shuffle = random.Random(plan.seed).shuffle
    repeats = [max(1, math.ceil(plan.sample / max(w.seconds, 1e-9))) for w in warmth]
    times: list[list[float]] = [[] for _ in calls]
    start = clock()
    with _no_collector():
        for done in range(plan.rounds):
            if done >= FEWEST and clock() - start > plan.seconds:
                break
            shuffle(order)
            for index in order:
                calls[index]()
                times[index].append(_timed(calls[index], repeats[index], clock))
            if progress is not None:
                progress(done + 1, plan.rounds)
    return times


def _timed(call: Call, repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector must not run inside a timed visit."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
