"""Timing by a clock that the tests turn."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from thresher.runtime.measure import FEWEST, Plan, Warmth, interleave, warm_up
from thresher.runtime.stats import median_interval, paired_ratio, settled, spread


class Clock:
    """Stands still, but for the jobs that take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def job(self, durations: Iterable[float]) -> Job:
        return Job(self, iter(durations))


class Job:
    def __init__(self, clock: Clock, durations: Iterator[float]) -> None:
        self.clock, self.durations, self.runs = clock, durations, 0

    def __call__(self) -> None:
        self.runs += 1
        self.clock.now += next(self.durations)


def test_warm_up_ends_when_five_times_agree() -> None:
    clock = Clock()
    job = clock.job([9, 5, 3, 2, 1, 1, 1, 1, 1, 1, 1])
    assert warm_up(job, Plan(), clock) == Warmth(9, True, 1.0)


def test_warm_up_has_a_limit() -> None:
    clock = Clock()
    found = warm_up(clock.job(itertools.cycle([1, 2])), Plan(warm_up=12), clock)
    assert (found.runs, found.steady) == (12, False)


def test_every_round_visits_everyone_in_a_changing_order() -> None:
    clock, seen = Clock(), []

    def visit(index: int) -> None:
        seen.append(index)
        clock.now += 1

    calls = [lambda i=i: visit(i) for i in range(3)]
    times = interleave(calls, [Warmth(5, True, 1.0)] * 3, Plan(rounds=20, seconds=1e9), clock)
    assert [len(values) for values in times] == [20, 20, 20]
    timed = seen[1::2]
    assert seen[::2] == timed, "each visit begins with one untimed run of the same candidate"
    rounds = [tuple(timed[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    assert len(set(rounds)) > 3


def test_short_runs_are_repeated_within_a_visit() -> None:
    clock = Clock()
    short, long = clock.job(itertools.repeat(0.001)), clock.job(itertools.repeat(1.0))
    plan = Plan(rounds=6, sample=0.005)
    warmth = [Warmth(5, True, 0.001), Warmth(5, True, 1.0)]
    times = interleave([short, long], warmth, plan, clock)
    assert (short.runs, long.runs) == (6 * (1 + 5), 6 * (1 + 1))
    assert times[0] == pytest.approx([0.001] * 6)


def test_time_runs_out_but_never_before_six_rounds() -> None:
    clock = Clock()
    plan = Plan(rounds=30, seconds=10)
    told: list[tuple[int, int]] = []
    slow = [clock.job(itertools.repeat(10.0))]
    times = interleave(slow, [Warmth(5, True, 10.0)], plan, clock, lambda *t: told.append(t))
    assert len(times[0]) == FEWEST
    assert told[-1] == (FEWEST, 30)


def test_a_slow_phase_of_the_machine_cancels_in_the_ratio() -> None:
    noise = random.Random(0)
    phase = [1 + 3 * (20 < i < 40) for i in range(60)]
    a = [2.0 * p * noise.uniform(1, 1.01) for p in phase]
    b = [1.0 * p * noise.uniform(1, 1.01) for p in phase]
    ratio = paired_ratio(a, b)
    assert ratio.median == pytest.approx(2, abs=0.01)
    assert ratio.high - ratio.low < 0.02
    assert not ratio.inside_noise


def test_quartiles() -> None:
    found = spread([5, 1, 2, 3, 4])
    assert (found.median, found.low, found.high, found.n) == (3, 2, 4, 5)
    assert found.relative == pytest.approx(2 / 3)
    assert spread([7]).high == 7


@pytest.mark.parametrize(("n", "k"), [(6, 1), (10, 2), (20, 6), (30, 10), (100, 40)])
def test_the_interval_takes_the_ranks_of_the_sign_test(n: int, k: int) -> None:
    """Ranks from the table of the binomial distribution, 95 %."""
    found = median_interval(list(range(1, n + 1)))
    assert (found.low, found.high) == (k, n + 1 - k)
    assert found.confidence >= 0.95


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_values_give_their_true_confidence(n: int) -> None:
    found = median_interval(list(range(n)))
    assert (found.low, found.high) == (0, n - 1)
    assert found.confidence == pytest.approx(1 - 2 * 0.5**n)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = rng.lognormal(size=(2000, 25))
    found = [median_interval(list(row)) for row in draws]
    share = sum(f.low <= 1.0 <= f.high for f in found) / len(found)
    assert abs(share - found[0].confidence) < 4 * math.sqrt(0.05 * 0.95 / 2000)


def test_settled_looks_at_the_last_window() -> None:
    assert settled([9, 1, 1, 1, 1, 1.04])
    assert not settled([1, 1, 1, 1])
    assert not settled([1, 1, 1, 1, 1.2])
