"""From a traced Program to an engine and back to the same numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiler.toys import TOKENS, WIDTH, Toy, traced
from thresher.compiler.contract import Context
from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.program import PassRecord, Program
from thresher.passes.tokens.methods import Tome, TomeOptions
from thresher.runtime import ProgramRunner, export, package, profile, verify
from thresher.runtime.measure import Plan
from thresher.runtime.sample import random_inputs


@pytest.fixture(scope="module")
def dense() -> Program:
    return traced(Toy())


@pytest.fixture(scope="module")
def reduced(dense: Program) -> Program:
    options = TomeOptions(r=2)
    result = Tome(options)(dense, Context())
    told = PassRecord("tome", {"r": 2}, result.matched, result.applied, details=result.details)
    return dataclasses.replace(result.program, history=(told,))


@pytest.fixture(scope="module")
def lowered(dense: Program) -> Any:
    from thresher.compiler.lowering import to_onnx

    return to_onnx(dense)


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_a_reduced_program_and_its_engine_agree(
    reduced: Program, tmp_path: Path, target: str
) -> None:
    pytest.importorskip("openvino")
    recipe = {"passes": [{"tome": {"r": 2}}]}
    with export(reduced, tmp_path / "e", target=target, threads=1, recipe=recipe) as engine:
        manifest = engine.manifest
        assert manifest.sites == len(reduced.ledger) > 0
        assert manifest.tokens is not None
        assert manifest.tokens[0] == TOKENS + 1
        assert manifest.prediction is not None
        assert manifest.prediction.ideal > 1
        assert manifest.recipe == recipe
        assert manifest.passes[0]["name"] == "tome"
        assert manifest.source["source"] == "toy"
        assert manifest.verified is not None
        found = verify(ProgramRunner(reduced, threads=1), engine)
    assert found.demanded == ("same",)
    assert found.met


def test_half_precision_keeps_float_edges(dense: Program, tmp_path: Path) -> None:
    with export(dense, tmp_path / "e", precision="fp16", threads=1) as engine:
        assert [spec.dtype for spec in (*engine.inputs, *engine.outputs)] == ["float32"] * 2
        assert verify(ProgramRunner(dense, threads=1), engine).same_function.tolerance > 0.01


def test_a_length_that_varies(tmp_path: Path) -> None:
    program = traced(Toy(pool="mean"), dynamic=True)
    with export(program, tmp_path / "e", threads=1) as engine:
        assert engine.inputs[0].shape == ("batch", "tokens", WIDTH)
        for tokens in (3, 20):
            feeds = random_inputs(engine.inputs, batch=3, sizes={"tokens": tokens})
            assert engine.run(feeds)["output"].shape == (3, 4)
        with pytest.raises(
            UsageError, match=r"axis 1 of the input 'x' \(tokens\) is 0 and must be"
        ):
            engine.run({"x": feeds["x"][:, :0]})


def test_numbers_that_differ_leave_no_engine(
    dense: Program, lowered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thresher.compiler.lowering.onnx_export.to_onnx", lambda *a, **k: lowered)
    right = ProgramRunner.run

    def wrong(self: ProgramRunner, inputs: Any) -> Any:
        return {name: value + 0.1 for name, value in right(self, inputs).items()}

    monkeypatch.setattr(ProgramRunner, "run", wrong)
    with pytest.raises(VerdictError, match="nothing was written"):
        export(dense, tmp_path / "e", threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_refused_before_lowering(
    dense: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine.txt").touch()
    monkeypatch.setattr(
        "thresher.compiler.lowering.to_onnx", lambda *a, **k: pytest.fail("lowered")
    )
    with pytest.raises(UsageError, match="exists already"):
        export(dense, tmp_path / "e")


def test_a_runner_checks_its_inputs_and_has_threads_of_its_own(dense: Program) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    runner = ProgramRunner(dense, threads=before + 1)
    runner._module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    runner.run(random_inputs(runner.inputs))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
    assert runner.ranges == {"batch": (1, None)}
    with pytest.raises(UsageError, match="no input 'y'"):
        runner.run({"y": torch.zeros(1).numpy()})


@pytest.mark.slow
def test_programs_are_profiled_as_engines(dense: Program, reduced: Program) -> None:
    plan = Plan(rounds=6, sample=0.0005)
    found = profile([dense, reduced], threads=1, plan=plan, memory=False, blocks=True)
    assert [c.name for c in found.candidates] == ["toy", "toy + tome"]
    assert [c.target for c in found.candidates] == ["cpu", "cpu"]
    assert found.timings[1].ideal is not None
    inserted = found.blocks[1].inserted
    assert "BipartiteMerge" in inserted
    where = [block.block for block in found.blocks[1].blocks]
    assert {"blocks.0", "blocks.1", "head"} <= set(where)


def test_eager_torch_is_measured_only_when_asked_for(
    dense: Program, lowered: Any, tmp_path: Path
) -> None:
    package(lowered, tmp_path / "e", threads=1).close()
    plan = Plan(rounds=6, sample=0.0005)
    eager = ProgramRunner(dense, threads=1)
    found = profile([tmp_path / "e", eager], threads=1, plan=plan, memory=False)
    assert [c.target for c in found.candidates] == ["cpu", "eager torch"]
