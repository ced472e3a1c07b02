"""The shipped network, on the first test images."""

from __future__ import annotations

import pytest

from tests.benchmarks import fashion
from thresher.compiler.contract import Context
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program
from thresher.compiler.recipe import load_recipe
from thresher.compiler.variants import reduced
from thresher.models.data import Dataset
from thresher.runtime import ProgramRunner
from thresher.runtime.paired import Metric, difference

LIMIT = 400


def others(items: int) -> Context:
    """The last images, none of which is scored here."""
    images = fashion.test_set(10_000)[0][-items:]
    return Context(
        data=Dataset("images", items, None, lambda chosen: {"images": images[list(chosen)]})
    )


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "most"), [(["count=2"], 0.02), (["part=half", "count=6"], 0.04)]
)
def test_blocks_of_little_influence_can_go(
    dense: Program, baseline: Metric, settings: list[str], most: float
) -> None:
    pruned = optimize(dense, load_recipe("drop-blocks", settings), others(128))
    details = pruned.history[0].details
    assert details["macs"] < 0.7 * details["dense_macs"]
    assert difference(score(pruned), baseline).value >= -most
