"""The rewriter: what it copies is the same program, what it emits is described by computation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.compiler.toys import TOKENS, WIDTH, Toy, traced
from thresher.compiler.program import Program, provenance
from thresher.compiler.surgery import Rewriter


def copied(program: Program) -> tuple[Rewriter, Program]:
    rewriter = Rewriter(program, "copy")
    for node in program.graph.nodes:
        if node.op != "output":
            rewriter.copy(node)
    exported = rewriter.finish([rewriter.map[n] for n in program.output_nodes()])
    return rewriter, dataclasses.replace(program, exported=exported)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_copy_is_bit_equal(batch: int) -> None:
    program = traced(Toy())
    _, same = copied(program)
    x = {"x": torch.randn(batch, TOKENS, WIDTH)}
    assert torch.equal(program.run(x)["output"], same.run(x)["output"])
    assert same.outputs == program.outputs
    assert same.inputs == program.inputs


def test_old_program_stays_untouched() -> None:
    program = traced(Toy())
    before = program.graph.python_code("self").src
    copied(program)
    assert program.graph.python_code("self").src == before


def test_inlined_function_carries_its_pass_and_true_shapes() -> None:
    program = traced(Toy())
    rewriter = Rewriter(program, "double")
    for node in program.graph.nodes:
        if node.op != "output":
            rewriter.copy(node)
    (output,) = program.output_nodes()
    rewriter.at(output, site=3)
    doubled = rewriter.inline(lambda x: torch.cat([x, x], dim=-1) * 2.0, rewriter.map[output])
    exported = rewriter.finish([doubled])
    result = dataclasses.replace(program, exported=exported)
    assert result.outputs[0].shape == ("batch", 8)
    assert provenance(doubled) == {"pass": "double", "site": 3}
    x = {"x": torch.randn(3, TOKENS, WIDTH)}
    assert torch.equal(result.run(x)["output"][:, :4], program.run(x)["output"] * 2.0)


def test_nodes_keep_their_names_beside_new_ones_of_the_same_operator() -> None:
    program = traced(Toy())
    rewriter = Rewriter(program, "squares")
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        copy = rewriter.copy(node)
        assert copy.name == node.name
        if node.target is torch.ops.aten.layer_norm.default:
            again = rewriter.copy(node)
            new = rewriter.inline(
                lambda x: torch.nn.functional.layer_norm(x, [WIDTH]).sum(-1), copy
            )
            assert not {again.name, new.name} & {n.name for n in program.graph.nodes}
    names = [node.name for node in rewriter.graph.nodes]
    assert len(names) == len(set(names))


def test_inline_refuses_hidden_constants() -> None:
    program = traced(Toy())
    rewriter = Rewriter(program, "bad")
    for node in program.graph.nodes:
        if node.op != "output":
            rewriter.copy(node)
    hidden = torch.randn(4)
    with pytest.raises(ValueError, match="constant tensor"):
        rewriter.inline(lambda x: x + hidden, rewriter.map[program.output_nodes()[0]])
