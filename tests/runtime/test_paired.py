"""Standard errors against plain loops, McNemar's formula and resampling done another way."""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from thresher.runtime.paired import Metric, difference
from thresher.runtime.quality import paired_error

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


@given(pairs)
def test_right_and_wrong_give_mcnemars_error_and_both_flips(
    answers: list[tuple[bool, bool]],
) -> None:
    new, old = (np.array(column) for column in zip(*answers, strict=True))
    found = difference(Metric("accuracy", new), Metric("accuracy", old))
    lost = sum(before and not after for after, before in answers)
    won = sum(after and not before for after, before in answers)
    assert (found.worse, found.better) == (lost, won)
    assert found.value == pytest.approx((won - lost) / len(answers))
    assert found.error == pytest.approx(paired_error(lost, won, len(answers)), abs=1e-12)


@given(st.lists(st.tuples(*[st.floats(-10, 10)] * 2), min_size=2, max_size=40))
def test_means_of_numbers_have_the_error_of_the_mean_difference(
    scores: list[tuple[float, float]],
) -> None:
    new, old = (np.array(column) for column in zip(*scores, strict=True))
    found = difference(Metric("IoU", new), Metric("IoU", old))
    apart = [a - b for a, b in scores]
    assert found.value == pytest.approx(fmean(apart), abs=1e-9)
    assert found.error == pytest.approx(pstdev(apart) / math.sqrt(len(apart)), abs=1e-9)
    assert (found.worse, found.better) == (None, None)


def test_pairing_sees_what_two_separate_errors_would_hide() -> None:
    rng = np.random.default_rng(0)
    old = rng.standard_normal(400)
    new = old + 0.02 + 0.05 * rng.standard_normal(400)
    found = difference(Metric("m", new), Metric("m", old))
    assert found.sigmas > 4
    assert Metric("m", new).error() > 10 * found.error


def mean(items: NDArray[Any]) -> float:
    return float(items.mean())


def test_resampling_agrees_with_the_closed_form_of_a_mean() -> None:
    rng = np.random.default_rng(1)
    new, old = rng.standard_normal((2, 300))
    exact = difference(Metric("m", new), Metric("m", old))
    drawn = difference(Metric("m", new, mean), Metric("m", old, mean))
    assert drawn.value == pytest.approx(exact.value)
    assert drawn.error == pytest.approx(exact.error, rel=0.1)  # 1000 draws: 4 errors of 2.2 %
    assert Metric("m", new, mean).error() == pytest.approx(Metric("m", new).error(), rel=0.1)


def correlation(columns: NDArray[Any]) -> float:
    return float(np.corrcoef(columns[:, 0], columns[:, 1])[0, 1])


def test_resampling_agrees_with_the_jackknife_of_a_correlation() -> None:
    """The jackknife leaves out one item at a time (Efron, 1982), and draws nothing."""
    rng = np.random.default_rng(2)
    truth = rng.standard_normal(250)
    near, far = (truth + noise * rng.standard_normal(250) for noise in (0.5, 0.8))
    new, old = (np.stack([guess, truth], 1) for guess in (far, near))
    found = difference(Metric("r", new, correlation), Metric("r", old, correlation))
    left = [
        correlation(np.delete(new, i, 0)) - correlation(np.delete(old, i, 0)) for i in range(250)
    ]
    assert found.value == pytest.approx(correlation(new) - correlation(old))
    assert found.error == pytest.approx(math.sqrt(249) * pstdev(left), rel=0.15)


def test_fewer_errors_are_better() -> None:
    worse, better = (
        Metric("WER", np.array(errors), larger_is_better=False)
        for errors in ([0, 2, 1, 0], [0, 0, 1, 1])
    )
    found = difference(better, worse)
    assert (found.value, found.worse, found.better) == (-0.25, 1, 1)
    assert found.sigmas > 0
    assert difference(worse, better).sigmas == -found.sigmas


def test_a_model_against_itself_and_against_one_that_always_differs() -> None:
    right, wrong = (Metric("accuracy", np.full(5, answer)) for answer in (True, False))
    same = difference(right, right)
    assert (same.value, same.error, same.sigmas) == (0, 0, 0)
    assert difference(wrong, right).sigmas == -math.inf


def test_only_right_and_wrong_are_a_share_of_the_items() -> None:
    kinds = [np.array([True]), np.array([1]), np.array([1.0])]
    told = [(Metric("m", items).percent, Metric("m", items).outcomes) for items in kinds]
    assert told == [(True, True), (False, True), (False, False)]
