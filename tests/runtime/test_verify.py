"""Error statistics against plain formulas, and two verdicts that do not mix."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.compiler.toys import Toy, traced
from tests.runtime.toys import Fake, transformer
from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import PassRecord, Program
from thresher.compiler.recipe import load_recipe
from thresher.runtime.bundle import Facts, package
from thresher.runtime.deviation import Deviations, OutputError, tolerance
from thresher.runtime.quality import paired_error
from thresher.runtime.runner import ProgramRunner
from thresher.runtime.verifying import verify

EPS = float(np.finfo(np.float32).eps)


def compared(a: Any, b: Any, *, discrete: bool = False, split: int = 1) -> OutputError:
    deviations = Deviations(tolerance("fp32"), discrete=discrete)
    pieces = zip(np.split(np.asarray(a), split), np.split(np.asarray(b), split), strict=True)
    for left, right in pieces:
        deviations.add({"y": left}, {"y": right})
    return deviations.results()[0]


@pytest.mark.parametrize("split", [1, 4])
def test_the_statistics_are_the_formulas(split: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((8, 5)).astype(np.float32)
    b = (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32)
    found = compared(a, b, split=split)
    error = b.astype(float) - a
    assert found.max_abs == pytest.approx(np.abs(error).max())
    assert found.mean_abs == pytest.approx(np.abs(error).mean())
    assert found.relative == pytest.approx(np.abs(error).max() / np.abs(a).max())
    assert found.sqnr_db == pytest.approx(
        10 * np.log10((a.astype(float) ** 2).sum() / (error**2).sum())
    )
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found.cosine == pytest.approx(cosines.mean(), rel=1e-5)
    assert found.top1 == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    assert (found.samples, found.agreeing, found.same) == (8, 0, False)


def test_equal_outputs() -> None:
    found = compared(np.ones((3, 4), np.float32), np.ones((3, 4), np.float32))
    assert found.same
    assert (found.max_abs, found.sqnr_db, found.cosine, found.top1) == (0, None, 1, 1)


def test_where_rounding_is_coarser_than_a_tie_it_is_what_counts() -> None:
    def same(factor: float) -> bool:
        deviations = Deviations(tolerance("bf16"), discrete=True)
        deviations.add({"y": np.ones((4, 3))}, {"y": np.full((4, 3), factor)})
        return deviations.results()[0].same

    assert same(1.1)
    assert not same(1.2)


def test_the_limit_is_relative_to_the_scale() -> None:
    a = np.full((2, 3), 1000, np.float32)
    assert compared(a, a * (1 + 400 * EPS)).same
    assert not compared(a, a * (1 + 700 * EPS)).same


def test_not_a_number_is_an_infinite_error() -> None:
    a = np.zeros((2, 2), np.float32)
    b = a.copy()
    b[0, 0] = np.nan
    found = compared(a, b)
    assert found.max_abs == math.inf
    assert not found.same
    assert compared(b, b).same
    infinite = np.where(np.isnan(b), np.inf, b)
    assert compared(infinite, infinite).same
    assert not compared(infinite, -infinite).same


def test_ties_between_tokens_may_move_a_quarter_of_the_samples() -> None:
    a = np.ones((8, 2), np.float32)
    b = a.copy()
    b[:2] += 0.04
    assert compared(a, b, discrete=True).same
    assert compared(a, b, discrete=True).agreeing == 6
    assert not compared(a, b).same
    far = b.copy()
    far[1] += 0.02
    assert not compared(a, far, discrete=True).same
    b[2] += 0.04
    assert not compared(a, b, discrete=True).same


def test_other_shapes_are_a_verdict() -> None:
    with pytest.raises(VerdictError, match=r"'y' is of shape \[2, 4\] and should be \[2, 3\]"):
        compared(np.zeros((2, 3)), np.zeros((2, 4)))


def test_half_precision_is_judged_by_its_own_rounding() -> None:
    assert tolerance("fp16").relative == pytest.approx(16 * 2**-10)
    assert "fp16" in tolerance("fp16").reason
    assert tolerance("bf16").relative == 8 * tolerance("fp16").relative


class Labelled:
    """Ten samples whose labels are their own argmax."""

    name = "toy"

    def __init__(self, labels: bool = True) -> None:
        self.labels = labels

    def batches(
        self, size: int, limit: int | None = None
    ) -> Iterator[tuple[dict[str, NDArray[Any]], NDArray[Any] | None]]:
        x = np.eye(10, dtype=np.float32)[: limit or 10]
        for start in range(0, len(x), size):
            part = x[start : start + size]
            yield {"x": part}, part.argmax(1) if self.labels else None


def wrong_on(*classes: int) -> Fake:
    """Right about every class but these."""
    shift = np.eye(10, dtype=np.float32)
    for index in classes:
        shift[index] = np.roll(shift[index], 1)
    return Fake(f"wrong on {classes}", lambda x: x @ shift, reduced=True)


def test_quality_is_counted_on_pairs() -> None:
    found = verify(wrong_on(0), wrong_on(1, 2, 3), dataset=Labelled(), batch=3)
    quality = found.quality
    assert quality is not None
    assert (quality.n, quality.accuracy_a, quality.accuracy_b) == (10, 0.9, 0.7)
    assert (quality.right_to_wrong, quality.wrong_to_right) == (3, 1)
    assert quality.difference == pytest.approx(-20)
    assert quality.standard_error == pytest.approx(100 * math.sqrt(4 - 4 / 10) / 10)
    assert quality.agreement == pytest.approx(0.6)
    assert quality.kept is None


def test_the_paired_error_is_that_of_the_differences() -> None:
    differences = np.array([1.0] * 3 + [-1.0] * 7 + [0.0] * 90)
    assert paired_error(7, 3, 100) == pytest.approx(differences.std() / 10)


@pytest.mark.parametrize(("most", "kept"), [(20.0, True), (19.9, False)])
def test_a_demanded_drop_is_a_verdict(most: float, kept: bool) -> None:
    found = verify(wrong_on(), wrong_on(4, 5), dataset=Labelled(), max_drop=most)
    assert found.quality is not None
    assert found.quality.kept is kept
    assert found.met is kept
    assert found.demanded == ("quality",)
    assert not found.same_function.same, "told, but not demanded"
    assert "within two standard errors" in found.sentences[1]


def test_the_same_function_is_demanded_of_equal_forms() -> None:
    dense, off = Fake("dense"), Fake("off", lambda x: x + np.float32(0.01))
    assert verify(dense, Fake("copy")).met
    assert not verify(dense, off).met
    assert verify(dense, off, same=False).met
    reduced = Fake("reduced", lambda x: x + np.float32(0.01), reduced=True)
    assert verify(dense, reduced).met, "token reduction changes numbers"
    assert not verify(dense, reduced, same=True).met


def test_passes_say_whether_they_change_numbers(tmp_path: Path) -> None:
    """Neurons that go are no tokens, and change outputs all the same; folding constants does not."""
    made = optimize(traced(Toy()), load_recipe("tome", ["r=2"]))
    assert {r.name: r.exact for r in made.history} == {"tome": False, "cleanup": True}
    assert {r.name: r.chooses_tokens for r in made.history} == {"tome": True, "cleanup": False}
    folded = dataclasses.replace(made.history[-1], applied=1)
    cut, idle = PassRecord("channels", {}, 2, 2), PassRecord("sparsity", {}, 2, 0)
    program = dataclasses.replace(made, history=(folded, cut, idle), ledger=())
    assert ProgramRunner(program, threads=1).changed_by == ("channels {}",)
    told = tuple(dataclasses.asdict(record) for record in program.history)
    built = package(transformer(), tmp_path / "e.engine", facts=Facts(passes=told), threads=1)
    assert (built.changed_by, built.reduced) == (("channels {}",), False)
    program.save(tmp_path / "saved")
    assert [r.exact for r in Program.load(tmp_path / "saved").history] == [True, False, False]

    other = Fake("cut", lambda x: x + np.float32(0.01))
    other.changed_by = ("channels {}",)
    assert verify(Fake("dense"), other).met
    assert not verify(other, Fake("off")).same_function.same
    again = Fake("engine", lambda x: x)
    again.changed_by = ("channels {}",)
    assert not verify(other, again).met


def test_other_options_make_another_function(tmp_path: Path) -> None:
    """Equal ones count as equal on whichever way they came: from memory, a folder or an engine."""
    one, two = (optimize(traced(Toy()), load_recipe("tome", [f"r={r}"])) for r in (1, 2))
    left, right = (ProgramRunner(program, threads=1) for program in (one, two))
    assert verify(left, right).met
    assert not verify(left, right, same=True).met
    one.save(tmp_path / "saved")
    told = tuple(dataclasses.asdict(record) for record in one.history)
    engine = package(transformer(), tmp_path / "e.engine", facts=Facts(passes=told), threads=1)
    loaded = ProgramRunner(Program.load(tmp_path / "saved"), threads=1)
    assert left.changed_by == loaded.changed_by == engine.changed_by


def test_ties_are_told() -> None:
    def tie(x: NDArray[Any]) -> NDArray[Any]:
        return np.where(np.arange(len(x))[:, None] == 0, x + np.float32(0.01), x)

    found = verify(Fake("program", reduced=True), Fake("engine", tie, reduced=True))
    assert found.met
    assert found.sentences[0].endswith("4 of 32 samples differ as by a tie between two tokens")


def test_given_inputs_are_used() -> None:
    a, b = Fake("a"), Fake("b")
    found = verify(a, b, inputs=[{"x": np.ones((3, 10), np.float32)}])
    assert (a.runs, b.runs) == (1, 1)
    assert found.same_function.inputs == "given"
    assert found.same_function.outputs[0].samples == 3


def test_a_drop_needs_labels() -> None:
    with pytest.raises(UsageError, match="needs labelled data"):
        verify(Fake("a"), Fake("b"), max_drop=1)
    with pytest.raises(UsageError, match="needs labels"):
        verify(Fake("a"), Fake("b"), dataset=Labelled(labels=False), max_drop=1)
    assert verify(Fake("a"), Fake("b"), dataset=Labelled(labels=False)).quality is None


def test_models_that_cannot_be_compared() -> None:
    other = Fake("other")
    other.outputs = (other.outputs[0].model_copy(update={"name": "features"}),)
    with pytest.raises(UsageError, match=r"other has the output 'features' .* and a has not"):
        verify(Fake("a"), other)
    with pytest.raises(UsageError, match="no logits among the outputs"):
        verify(Fake("a"), Fake("b"), dataset=Labelled(), output="features")


def test_the_result_is_plain_json() -> None:
    found = verify(Fake("a"), Fake("b", lambda x: x * np.float32(np.nan)), dataset=Labelled())
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["schema"] == "thresher.verify/1"
