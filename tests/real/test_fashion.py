"""The shipped network, on the first test images."""

from __future__ import annotations

import pytest

from tests.benchmarks import fashion
from thresher.compiler.program import Program
from thresher.compiler.variants import reduced
from thresher.runtime import ProgramRunner
from thresher.runtime.paired import Metric, difference

LIMIT = 400


def score(program: Program) -> Metric:
    return fashion.accuracy(ProgramRunner(program, threads=1), LIMIT)[0]


@pytest.fixture(scope="module")
def dense() -> Program:
    return fashion.program()


@pytest.fixture(scope="module")
def baseline(dense: Program) -> Metric:
    return score(dense)


def test_the_dense_accuracy_on_the_first_images(baseline: Metric) -> None:
    assert baseline.value == pytest.approx(374 / 400, abs=1 / 400)  # rounding may turn one image


@pytest.mark.slow
def test_the_dense_accuracy_is_the_published_one(dense: Program) -> None:
    (found,) = fashion.accuracy(ProgramRunner(dense, threads=1), 10_000)
    assert found.value == pytest.approx(0.9025, abs=0.0005)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "most"), [("tome", 0.02), ("evit", 0.05)])
def test_two_thirds_of_the_work_keep_the_accuracy(
    dense: Program, baseline: Metric, method: str, most: float
) -> None:
    case = reduced(dense, method, 0.65)
    assert case.program is not None, case.refused
    assert case.share == pytest.approx(0.65, rel=0.03)
    found = difference(score(case.program), baseline)
    assert found.value >= -most
    assert found.worse is not None
    assert found.better is not None
    assert found.worse + found.better <= LIMIT * 0.1
