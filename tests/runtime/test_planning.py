"""Everything in the way of a target is told at once, before a build."""

from __future__ import annotations

import pytest

from tests.compiler.toys import Toy, traced
from thresher.compiler.program import Program
from thresher.runtime.backends import backend
from thresher.runtime.backends.base import Availability
from thresher.runtime.backends.openvino import OpenVino
from thresher.runtime.backends.tensorrt_rtx import TensorRtRtx
from thresher.runtime.planning import outlook


@pytest.fixture(scope="module")
def program() -> Program:
    return traced(Toy())


def test_every_trouble_is_told_with_its_remedy(program: Program) -> None:
    found = outlook(program, backend("tensorrt"), "bf16", ["x=4x9", "y=1"])
    told = [(trouble.about, trouble.exit_code) for trouble in found.troubles]
    assert [one for one in told if one[0] != "package"] == [
        ("precision", 2),
        ("shape", 2),
        ("shape", 2),
        ("shape", 2),
    ]
    assert all(trouble.reason and trouble.remedy for trouble in found.troubles)
    assert found.troubles[-1].remedy == "give for example --shape x=1..32x9x16@8"
    assert found.memory is not None


def test_integers_need_data_that_plan_is_not_given(program: Program) -> None:
    found = outlook(program, backend("cpu"), "int8")
    assert found.troubles == ()
    assert found.needs == "int8 is calibrated on data: give export --data"
    assert outlook(program, backend("cpu"), "fp16").needs == ""


def test_a_node_is_told_with_its_module_and_where_it_is_taken(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVino, "can_take", lambda self, node, opset: odd(node.op_type))
    found = outlook(program, backend("openvino"))
    assert {trouble.op for trouble in found.troubles} == {"Gelu"}
    first = found.troubles[0]
    assert (first.about, first.source, first.exit_code) == ("node", "blocks.0", 3)
    assert first.remedy == (
        "take the target cpu or cuda or jetson-orin or jetson-thor or tensorrt or tensorrt-rtx"
    )


def odd(op: str) -> str | None:
    return "it is odd" if op == "Gelu" else None


def test_a_node_of_an_inserted_step_names_what_inserted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.compiler.pipeline import optimize
    from thresher.compiler.recipe import load_recipe

    reduced = optimize(traced(Toy()), load_recipe("tome", ["r=2"]))
    monkeypatch.setattr(TensorRtRtx, "available", lambda self: Availability(True))
    monkeypatch.setattr(TensorRtRtx, "can_take", lambda self, node, opset: topk(node.op_type))
    found = outlook(reduced, backend("tensorrt-rtx"), "fp32", ["x=1..4x9x16"])
    assert {(one.about, one.op) for one in found.troubles} == {("node", "TopK")}
    remedy = found.troubles[0].remedy
    assert remedy.startswith(
        "leave out the body of thresher::BipartiteMerge, or take the target cpu"
    )


def topk(op: str) -> str | None:
    return "too long" if op == "TopK" else None
