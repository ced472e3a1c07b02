"""A trained module need not be trained again: not for the same graph, and not for another budget."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiler.toys import TOKENS
from tests.passes.adaptive.test_acm import BLOCKS, STEPS, context, dense, noise
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program, stored_tensors
from thresher.passes.adaptive.acm import Acm
from thresher.passes.adaptive.job import AcmOptions
from thresher.passes.learning.batches import HELD_OUT, LEAST_ITEMS

MANY = HELD_OUT * LEAST_ITEMS  # items, of which as many as ever are held out


@cache
def trained() -> PassResult:
    return Acm(AcmOptions(**STEPS, budget=0.5))(dense(), context())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = trained().calibration
    assert found is not None
    found.write(tmp_path)
    return tmp_path / found.file


def again(file: Path, given: Context | None = None, **options: Any) -> PassResult:
    chosen = AcmOptions(**STEPS, **{"budget": 0.5, "calibration": file, **options})
    return Acm(chosen)(dense(), given or Context())


def test_the_same_graph_without_data(file: Path, tmp_path: Path) -> None:
    found, first = again(file), trained()
    assert found.program.text() == first.program.text()
    ours, theirs = (stored_tensors(r.program.exported) for r in (found, first))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    notes = [[n.meta.get("custom") for n in r.program.graph.nodes] for r in (found, first)]
    assert notes[0] == notes[1]
    assert found.details["share"] == first.details["share"]
    assert found.options == first.options
    assert found.calibration is not None
    (tmp_path / "second").mkdir()
    found.calibration.write(tmp_path / "second")
    assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("budget", [0.25, 0.75])
def test_another_budget_is_met_on_items_held_out(file: Path, budget: float) -> None:
    given = replace(context(noise(labels=False, items=MANY)), batch=64)
    found = again(file, given, budget=budget)
    tokens = HELD_OUT * (TOKENS + 1) * BLOCKS
    four_errors = 4 * (0.25 / tokens) ** 0.5  # of a mean of independent tokens that run all or none
    assert found.details["share"] == pytest.approx(budget, rel=0.02, abs=four_errors)
    ours, theirs = (stored_tensors(r.program.exported) for r in (found, trained()))
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {name for name in ours if name.startswith("gate_bias")}


def test_mistakes(file: Path) -> None:
    with pytest.raises(
        UsageError, match=r"meet budget=0.5, and for 0.25 they .* --learn-data DATA"
    ):
        again(file, budget=0.25)
    with pytest.raises(UsageError, match="was made with learners=4 and not learners=2"):
        again(file, learners=2)
    with pytest.raises(UsageError, match=r"there is no calibration .* and calibration=null"):
        again(file.with_name("none.safetensors"))
    other: Program = trained().program
    with pytest.raises(UsageError, match="was made on other weights"):
        Acm(AcmOptions(calibration=file))(_reseeded(), Context())
    assert other.text() == trained().program.text()


def _reseeded() -> Program:
    from tests.compiler.toys import Toy, traced

    torch.manual_seed(2)
    return traced(Toy())
