"""Feed-forward networks are found by data flow, and what is none is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.compiler.toys import WIDTH, Block
from tests.passes.sparsity.toys import HIDDEN, Gated, toy
from thresher.passes.sparsity.sites import find


@pytest.mark.parametrize(
    ("block", "sources", "gated"),
    [(Block(), 1, False), (Gated(), 2, True), (Gated(fused=True), 1, True)],
    ids=["plain", "gated", "fused"],
)
def test_every_kind_is_found(block: Block, sources: int, gated: bool) -> None:
    found = find(toy(block, copy.deepcopy(block)))
    assert found.refusals == []
    assert [(f.layer, f.width, len(f.linears), f.gated) for f in found.ffns] == [
        (layer, HIDDEN, sources, gated) for layer in range(2)
    ]
    assert all((f.gate is not None) is gated for f in found.ffns)
    names = [entry.name for entry in found.inputs]
    assert names == [f"{n}.{kind}" for n in range(2) for kind in ("qkv", "out", "up", "down")]
    assert [len(e.linears) for e in found.inputs if e.kind == "up"] == [sources, sources]


class Shared(Block):
    """Both linears of the network are one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, WIDTH)
        self.fc2 = self.fc1


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Gated(norm=True), "normalises over the neurons"),
        (Gated(shown=True), "is also read by slice"),
        (Shared(), "shares its weight with linear"),
    ],
)
def test_refusals_name_node_and_reason(block: Block, reason: str) -> None:
    program = toy(block)
    found = find(program)
    assert found.ffns == []
    (refusal,) = found.refusals
    assert reason in refusal.reason
    assert refusal.node in {node.name for node in program.graph.nodes}


class Pooled(Block):
    """A network whose result goes nowhere but out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))  # type: ignore[no-any-return]


def test_a_head_is_no_network() -> None:
    (refusal,) = find(toy(Pooled())).refusals
    assert "does not return to a residual stream" in refusal.reason
