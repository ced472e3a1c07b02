"""The Pareto front and the answer to the demands."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.search.toys import outcome
from thresher.passes.tokens.search.front import Demands, best, front
from thresher.passes.tokens.search.outcome import Counts, Outcome, Quality, Timing

VALUES = st.integers(0, 5).map(lambda n: n / 5)


def timed(score: float, share: float, speedup: float) -> Outcome:
    return dataclasses.replace(
        outcome(score, share), timing=Timing(0.1, speedup, speedup - 0.1, speedup + 0.1)
    )


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    known: dict[Counts, Outcome] = {
        (i,): outcome(score, share) for i, (score, share) in enumerate(points)
    }
    found = [(known[c].quality.score, known[c].share) for c in front(known, "flops")]
    beaten = {
        (score, share)
        for score, share in points
        for other, cost in points
        if other >= score and cost <= share and (other, cost) != (score, share)
    }
    assert sorted(found) == sorted({*points} - beaten)
    assert [cost for _, cost in found] == sorted(cost for _, cost in found)


KNOWN: dict[Counts, Outcome] = {
    (9,): timed(1.00, 0.9, 1.1),
    (7,): timed(0.99, 0.7, 1.5),
    (5,): timed(0.95, 0.5, 1.9),
    (4,): timed(0.94, 0.6, 1.7),
}


@pytest.mark.parametrize(
    ("demands", "answer"),
    [
        (Demands(speedup=1.4), (7,)),
        (Demands(speedup=1.6), (5,)),
        (Demands(speedup=3.0), (5,)),  # out of reach: the fastest
        (Demands(flops=0.6), (5,)),
        (Demands(flops=0.8, drop=0.02), (7,)),
        (Demands(drop=0.02), (7,)),
        (Demands(drop=0.2), (5,)),
        (Demands(), (9,)),  # no drop at all is allowed
        (Demands(tolerance=0.015), (7,)),
        (Demands(drop=0.2, tolerance=0.0), (5,)),
        (Demands(drop=-1.0), (9,)),  # out of reach: the best quality
    ],
)
def test_the_answer_meets_the_demands_or_comes_nearest(demands: Demands, answer: Counts) -> None:
    assert best(KNOWN, demands, "time") == answer


def test_a_drop_within_its_error_is_none() -> None:
    known: dict[Counts, Outcome] = {(9,): outcome(1.0, 0.9), (5,): outcome(0.98, 0.5, error=0.03)}
    assert best(known, Demands(), "flops") == (5,)


@pytest.mark.parametrize(
    ("demands", "harmless"),
    [
        (Demands(), True),
        (Demands(tolerance=0.01), False),
        (Demands(tolerance=0.05), True),
        (Demands(drop=0.01), False),
        (Demands(drop=0.01, tolerance=0.05), False),
    ],
)
def test_no_drop_is_one_within_the_tolerance_and_the_demand(
    demands: Demands, harmless: bool
) -> None:
    assert demands.harmless(outcome(0.98, error=0.03).quality) is harmless


def test_demands_are_met_or_missed() -> None:
    found = timed(0.98, 0.65, 1.4)
    assert Demands(flops=0.65).spends(found)
    assert not Demands(flops=0.64).spends(found)
    assert Demands(speedup=1.4).spends(found)
    assert Demands(speedup=1.5).excess(found) == pytest.approx(1.5 / 1.4 - 1)
    assert Demands(drop=0.03).keeps(found.quality)
    assert not Demands(drop=0.01).keeps(found.quality)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_paired_quality_is_mcnemar(answers: list[tuple[bool, bool]]) -> None:
    dense, found = (np.array(side, float) for side in zip(*answers, strict=True))
    n = len(answers)
    lost = sum(d and not f for d, f in answers)
    won = sum(f and not d for d, f in answers)
    quality = Quality.paired(dense, found)
    assert quality.drop == pytest.approx((lost - won) / n)
    error = (max(0.0, lost + won - (won - lost) ** 2 / n)) ** 0.5 / n
    assert quality.standard_error == pytest.approx(error, abs=1e-9)
    assert quality.n == n
    assert quality.score == pytest.approx(sum(f for _, f in answers) / n)
