"""Dimension variables: equalities that operators imply, and the derived forms."""

from __future__ import annotations

import torch
from torch import fx, nn

from thresher.compiler.analysis.axes import Axes, infer
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace


def axes_of(module: nn.Module, *shape: int) -> tuple[Program, Axes]:
    program = trace(
        module, {"x": torch.randn(*shape)}, dynamic={"x": {0: "batch"}}, info=SourceInfo("toy")
    )
    return program, infer(program.graph)


def node(program: Program, name: str) -> fx.Node:
    found: fx.Node = next(n for n in program.graph.nodes if n.name == name)
    return found


class Fn(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)  # type: ignore[operator, no-any-return]


def test_split_heads_and_back_is_the_same_axis() -> None:
    program, axes = axes_of(
        Fn(lambda x: x.reshape(-1, 5, 2, 4).transpose(1, 2).transpose(1, 2).reshape(-1, 5, 8)),
        2,
        5,
        8,
    )
    source, result = program.input_nodes()[0], program.output_nodes()[0]
    assert axes.of(result) == axes.of(source)


def test_prefix_cut_off_and_put_back_is_the_same_axis() -> None:
    program, axes = axes_of(Fn(lambda x: torch.cat([x[:, :1], x[:, 1:] * 2.0], dim=1)), 2, 5, 8)
    source, result = program.input_nodes()[0], program.output_nodes()[0]
    assert axes.of(result) == axes.of(source)


def test_suffix_knows_its_offset() -> None:
    program, axes = axes_of(Fn(lambda x: x[:, 2:].mean(dim=1)), 2, 5, 8)
    source = program.input_nodes()[0]
    cut = next(
        n
        for n in program.graph.nodes
        if n.target is torch.ops.aten.slice.Tensor and n.meta["val"].shape[1] == 3
    )
    offsets = axes.variables.offsets(axes.of(source)[1])
    assert offsets[axes.of(cut)[1]] == -2


def test_merged_batch_and_tokens_come_apart_again() -> None:
    program, axes = axes_of(Fn(lambda x: x.flatten(0, 1).relu().unflatten(0, (-1, 5))), 2, 5, 8)
    source, result = program.input_nodes()[0], program.output_nodes()[0]
    assert axes.of(result)[1:] == axes.of(source)[1:]


def test_reshape_to_a_grid_is_a_mix_with_its_reason() -> None:
    program, axes = axes_of(Fn(lambda x: x.reshape(-1, 2, 3, 8)), 2, 6, 8)
    source = program.input_nodes()[0]
    uses = [u for u in axes.uses if u.operand is source and u.axis == 1]
    assert [u.kind for u in uses] == ["mix"]
    assert "grid" in uses[0].why


def test_unknown_operator_mixes_everything() -> None:
    program, axes = axes_of(Fn(lambda x: torch.cdist(x, x)), 2, 6, 8)
    source = program.input_nodes()[0]
    assert any(
        u.kind == "mix" and "does not know" in u.why
        for u in axes.uses
        if u.operand is source and u.axis == 1
    )


def test_elementwise_broadcast_ties_axes() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 6, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table

    program, axes = axes_of(Table(), 2, 6, 8)
    assert axes.of(node(program, "p_table"))[1] == axes.of(program.input_nodes()[0])[1]


def test_a_pointwise_convolution_keeps_places_and_a_wider_one_does_not() -> None:
    weight, wide = torch.randn(4, 8, 1), torch.randn(4, 8, 3)
    for function, same in (
        (lambda x: torch.nn.functional.conv1d(x, weight), True),
        (lambda x: torch.nn.functional.conv1d(x, weight, stride=1, padding=1)[..., 1:-1], False),
        (lambda x: torch.nn.functional.conv1d(x, wide, padding=1), False),
    ):
        program, axes = axes_of(Fn(function), 2, 8, 5)
        source, result = program.input_nodes()[0], program.output_nodes()[0]
        assert (axes.of(result)[2] == axes.of(source)[2]) is same
        mixed = {u.axis for u in axes.uses if u.operand is source and u.kind == "mix"}
        assert mixed == ({1} if same else {1, 2})


def test_a_slice_counted_from_the_end_is_a_suffix() -> None:
    program, axes = axes_of(Fn(lambda x: x[:, -3:] * 2.0), 2, 5, 8)
    source, result = program.input_nodes()[0], program.output_nodes()[0]
    assert axes.variables.offsets(axes.of(source)[1])[axes.of(result)[1]] == -2


def test_a_norm_over_channels_leaves_tokens_alone() -> None:
    program, axes = axes_of(Fn(lambda x: torch.nn.functional.normalize(x, dim=-1)), 2, 5, 8)
    source, result = program.input_nodes()[0], program.output_nodes()[0]
    assert axes.of(result) == axes.of(source)
    assert {u.axis for u in axes.uses if u.operand is source and u.kind == "mix"} == {2}


def test_one_reshape_may_merge_some_axes_and_split_others() -> None:
    """As attention with weights does: ``[N, B H, d] -> [N B, H d] -> [N, B, H d]``."""

    def function(x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        folded = x.transpose(0, 1).reshape(5, batch * 2, 4)
        return (folded * 2.0).reshape(5 * batch, 8).reshape(5, batch, 8).transpose(0, 1)

    program, axes = axes_of(Fn(function), 2, 5, 8)
    source, result = program.input_nodes()[0], program.output_nodes()[0]
    assert axes.of(result)[1] == axes.of(source)[1]
    assert not any(u.axis == 1 and u.operand is source and u.kind == "mix" for u in axes.uses)


def test_a_reshape_across_axes_mixes_them() -> None:
    program, axes = axes_of(Fn(lambda x: x.reshape(-1, 8, 5)), 2, 5, 8)
    source = program.input_nodes()[0]
    assert {u.axis for u in axes.uses if u.operand is source and u.kind == "mix"} == {1, 2}
