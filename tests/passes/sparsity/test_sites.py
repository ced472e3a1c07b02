"""Feed-forward networks are found by data flow, and what is none is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compiler.toys import WIDTH, Block, Toy, traced
from tests.passes.sparsity.toys import HIDDEN, toy
from thresher.compiler import pipeline
from thresher.compiler.contract import Context
from thresher.compiler.recipe import parse_recipe
from thresher.passes.sparsity.sites import find


@pytest.mark.parametrize(
    ("kind", "sources", "gated"), [("plain", 1, False), ("gated", 2, True), ("fused", 1, True)]
)
def test_every_kind_is_found(kind: str, sources: int, gated: bool) -> None:
    found = find(toy(kind, kind))
    assert found.refusals == []
    assert [(f.layer, f.width, len(f.linears), f.gated) for f in found.ffns] == [
        (layer, HIDDEN, sources, gated) for layer in range(2)
    ]
    assert all((f.gate is not None) is gated for f in found.ffns)
    names = [entry.name for entry in found.inputs]
    assert names == [f"{n}.{kind}" for n in range(2) for kind in ("qkv", "out", "up", "down")]
    assert [len(e.linears) for e in found.inputs if e.kind == "up"] == [sources, sources]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("normed", "normalises over the neurons"), ("shown", "is also read by slice")],
)
def test_refusals_name_node_and_reason(kind: str, reason: str) -> None:
    program = toy(kind)
    found = find(program)
    assert found.ffns == []
    (refusal,) = found.refusals
    assert reason in refusal.reason
    assert refusal.node in {node.name for node in program.graph.nodes}


def test_blocks_that_share_weights_are_refused() -> None:
    block = Block()
    reasons = [refusal.reason for refusal in find(traced(Toy(block, block))).refusals]
    assert len(reasons) == 2
    assert all("shares its weight with linear" in reason for reason in reasons)


class Pooled(Block):
    """A network whose result goes nowhere but out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.fc2(torch.tanh(self.fc1(x)))
        return pooled


def test_a_head_is_no_network() -> None:
    (refusal,) = find(traced(Toy(Pooled()))).refusals
    assert "does not return to a residual stream" in refusal.reason


def test_names_are_the_same_behind_a_merge() -> None:
    dense = toy("plain", "gated", "plain")
    merged = pipeline.run(dense, parse_recipe("passes: [{tome: {r: 2}}]", "test"), Context())
    names, before = ([e.name for e in find(p).inputs] for p in (merged, dense))
    assert names == before


class Crossed(Block):
    """Queries of the stream, keys and values of its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.k(self.norm1(x))
        q, k = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q(x), y))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2))
        result: torch.Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return result


def test_inputs_of_one_name_are_refused() -> None:
    found = find(traced(Toy(Crossed())))
    assert [e.name for e in found.inputs] == ["0.out", "0.up", "0.down"]
    assert len(found.refusals) == 2
    assert all("2 places that would be called 0.qkv" in r.reason for r in found.refusals)
