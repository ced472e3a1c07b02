"""The executable spec: every rule fires on the smallest breach and names its node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from tests.compiler.broken import PROGRAM, aten, negated, node, rewritten
from tests.compiler.toys import Toy, traced
from thresher.compiler.contract import Context
from thresher.compiler.errors import RefusedError
from thresher.compiler.forbidden import forbidden
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.spec import SPECS, SpecError, verify
from thresher.compiler.surgery import Rewriter
from thresher.compiler.text import op_name
from thresher.compiler.trace import trace
from thresher.passes.tokens.methods import Tome, TomeOptions


def problems(program: Program, stage: str = "optimised", source: Program = PROGRAM) -> str:
    with pytest.raises(SpecError) as caught:
        verify(program, stage, source)
    return str(caught.value)


@cache
def toy(dynamic: bool) -> Program:
    return traced(Toy(), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_traced_program_is_legal_at_every_stage_and_stays_as_it_is(dynamic: bool) -> None:
    program = toy(dynamic)
    text = program.text()
    for stage in SPECS:
        verify(program, stage, program)
        verify(rewritten(program, negated), stage, program)
    assert program.text() == text


def test_missing_metadata() -> None:
    program = rewritten(PROGRAM)
    del node(program, "gelu").meta["val"]
    assert "node 'gelu' has no shape and dtype" in problems(program)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.double(), r"states float64 [s77, 10, 32] and is float32 [s77, 10, 32]"),
        (lambda v: v[:, 1:], r"states float32 [s77, 9, 32] and is float32 [s77, 10, 32]"),
        (lambda v: [v], r"states (float32 [s77, 10, 32]) and is float32 [s77, 10, 32]"),
    ],
)
def test_wrong_metadata(change: Callable[[torch.Tensor], object], said: str) -> None:
    program = rewritten(PROGRAM)
    wrong = node(program, "gelu")
    with wrong.meta["val"].fake_mode:
        wrong.meta["val"] = change(wrong.meta["val"])
    assert f"node 'gelu' (aten.gelu) is wrongly described: {said}" in problems(program)


def test_an_operator_that_does_not_fit_its_operands() -> None:
    program = rewritten(PROGRAM)
    gelu = node(program, "gelu")
    gelu.replace_input_with(node(program, "linear_2"), node(program, "x"))
    assert "node 'linear_3' " not in problems(program)
    assert "node 'gelu' (aten.gelu) is wrongly described" in problems(program)
    node(program, "linear_3").replace_input_with(gelu, node(program, "x"))
    assert "node 'linear_3' (aten.linear) cannot be computed" in problems(program)


def test_a_graph_out_of_order() -> None:
    program = rewritten(PROGRAM)
    node(program, "add").prepend(node(program, "layer_norm_1"))
    assert "node 'output' ends a graph that is not well formed" in problems(program)


def test_signature_that_does_not_fit() -> None:
    program = rewritten(PROGRAM)
    program.exported.graph_signature.output_specs[0].arg.name = "gelu"
    assert "is returned in place of gelu in the signature" in problems(program)


def test_a_weight_that_is_not_there_or_does_not_fit() -> None:
    program = rewritten(PROGRAM)
    del program.exported.state_dict["cls_token"]
    program.exported.state_dict["head.bias"] = nn.Parameter(torch.zeros(5))
    said = problems(program)
    assert "node 'p_cls_token' reads the weight 'cls_token', which is not stored" in said
    assert "node 'p_head_bias' does not fit its weight 'head.bias'" in said


def test_everything_is_said_at_once() -> None:
    program = rewritten(PROGRAM)
    kinds = ["linear", "linear_1", "linear_2", "gelu", "linear_3", "add", "add_1"]
    nodes = [node(program, kind) for kind in kinds]
    for one in nodes:
        del one.meta["val"]
    with pytest.raises(SpecError) as caught:
        verify(program, "imported")
    assert {problem.node for problem in caught.value.problems} >= {one.name for one in nodes}
    assert "; and " in str(caught.value)


def test_outputs_keep_name_dtype_and_shape() -> None:
    def doubled(rewriter: Rewriter, outputs: list[fx.Node]) -> list[fx.Node]:
        return [rewriter.emit(aten.to.dtype, n, torch.float64) for n in outputs]

    assert "'output' (output) has dtype float64 instead of float32" in problems(
        rewritten(PROGRAM, doubled)
    )
    renamed = dataclasses.replace(rewritten(PROGRAM), output_names=("other",))
    assert "'output' (output) has name other instead of output" in problems(renamed)


def test_shapes_of_outputs_may_change_where_that_is_asked_for() -> None:
    def cut(rewriter: Rewriter, outputs: list[fx.Node]) -> list[fx.Node]:
        return [rewriter.emit(aten.slice.Tensor, n, 1, 0, 2) for n in outputs]

    program = rewritten(PROGRAM, cut)
    assert "has shape ('batch', 2) instead of ('batch', 4)" in problems(program)
    verify(program, "optimised", PROGRAM, same_shapes=False)


@pytest.mark.parametrize("dynamic", [False, True])
def test_ledger_agrees_with_its_nodes(dynamic: bool) -> None:
    source = toy(dynamic)
    program = Tome(TomeOptions(r=2))(source, Context()).program
    verify(program, "lowerable", source)
    entry = program.ledger[0]
    for change, said in (
        ({"node": "gone"}, "node 'gone' is in the ledger (block 0), not in the graph"),
        ({"tokens_out": 7}, "and the ledger states output 3 (kept) as int64 [batch, 7]"),
        ({"slot": 9}, "has no such output and the ledger states output 9 (slot)"),
        ({"slot": 0}, "has float32 [s77"),
    ):
        wrong = dataclasses.replace(program, ledger=(dataclasses.replace(entry, **change),))
        assert said in problems(wrong, source=source)
    wrong = dataclasses.replace(program, ledger=program.ledger[::-1])
    assert f"is listed before {entry.node}, which runs before it" in problems(wrong, source=source)


def test_a_loaded_program_is_as_legal_as_the_saved_one(tmp_path: Path) -> None:
    program = Tome(TomeOptions(r=2))(toy(True), Context()).program
    program.save(tmp_path / "small")
    loaded = Program.load(tmp_path / "small")
    verify(loaded, "lowerable", toy(True))
    verify(rewritten(loaded, negated), "lowerable", loaded)


class Asserting(nn.Module):
    """Traces to an operator that yields nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float64) + 1


def test_operators_that_yield_nothing_need_no_description() -> None:
    program = trace(Asserting(), {"x": torch.randn(3)}, dynamic={}, info=SourceInfo("toy"))
    assert "_assert_tensor_metadata" in program.text()
    verify(program, "lowerable", program)


class Everything(nn.Module):
    """Every kind of forbidden operator, beside two that look like one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zeros = torch.zeros_like(x, dtype=torch.int64)
        return (
            x.scatter_add(1, zeros, x),
            x.scatter_reduce(1, zeros, x, "amax"),
            x.scatter(1, zeros, x, reduce="add"),
            x.index_add(1, zeros[0], x),
            x.index_put((zeros[:, 0],), x, accumulate=True),
            x.nonzero(),
            x[x > 0],
            x.masked_select(x > 0),
            torch.unique(x),
            x.scatter(1, zeros, x),
            x[:, zeros[0]],
        )


def test_forbidden_operators() -> None:
    program = trace(
        Everything(), {"x": torch.randn(3, 4)}, dynamic={"x": {0: "batch"}}, info=SourceInfo("toy")
    )
    verify(program, "imported")
    assert [op_name(n.target) for n in program.graph.nodes if forbidden(n)] == [
        "aten.scatter_add",
        "aten.scatter_reduce.two",
        "aten.scatter.reduce",
        "aten.index_add",
        "aten.index_put",
        "aten.nonzero",
        "aten.index.Tensor",
        "aten.masked_select",
        "aten._unique2",
    ]
    said = r"toy is not lowerable: node 'scatter_add' \(aten.scatter_add\) combines .*and 4 more"
    with pytest.raises(RefusedError, match=said):
        verify(program, "lowerable", program)


def test_a_pass_may_not_bring_in_a_forbidden_operator() -> None:
    def add(rewriter: Rewriter, outputs: list[fx.Node]) -> list[fx.Node]:
        return [
            rewriter.inline(lambda x: x.scatter_add(1, torch.zeros_like(x).long(), x), n)
            for n in outputs
        ]

    assert "node 'scatter_add' (aten.scatter_add) combines" in problems(rewritten(PROGRAM, add))


def test_arguments_keep_their_capital_letters() -> None:
    class Shouting(nn.Module):
        def forward(self, pixelValues: torch.Tensor) -> torch.Tensor:
            return pixelValues * 2

    program = trace(Shouting(), {"pixelValues": torch.ones(3)}, dynamic={}, info=SourceInfo("toy"))
    assert [spec.name for spec in program.inputs] == ["pixelValues"]
