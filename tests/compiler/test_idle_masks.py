"""Masks that hide nothing go, all others stay; bounds hold for whatever is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thresher.compiler.analysis.attention import SDPA, Attention
from thresher.compiler.analysis.bounds import ANYTHING, ValueBounds
from thresher.compiler.idle_masks import without_idle_masks
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace

Mask = Callable[[Tensor], Tensor]
TOKENS, WIDTH = 5, 4


class Masked(nn.Module):
    """One attention of a sequence with itself, under a mask made of it."""

    ones: Tensor
    mixed: Tensor

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        self.register_buffer("ones", torch.ones(TOKENS, dtype=torch.bool))
        self.register_buffer("mixed", torch.tensor([True, False, True, True, True]))

    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=self.mask(x), scale=0.5)[:, 0]


def program(make: Callable[[Masked], Mask]) -> Program:
    model = Masked(lambda x: x)
    model.mask = make(model)
    example = {"x": torch.randn(2, TOKENS, WIDTH)}
    return trace(model, example, dynamic={"x": {0: "batch"}}, info=SourceInfo("toy"))


def places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


IDLE: dict[str, Callable[[Masked], Mask]] = {
    "as transformers": lambda m: (
        lambda x: (places(x) + 0)[None, None, :, None].ge(0).expand(x.shape[0], -1, TOKENS, TOKENS)
    ),
    "ones and ones": lambda m: (
        lambda x: torch.ones(TOKENS, TOKENS, dtype=torch.bool) & m.ones[None, :]
    ),
    "nothing added": lambda m: lambda x: torch.zeros(x.shape[0], 1, TOKENS, TOKENS) * 1.0,
    "minus where not": lambda m: (
        lambda x: torch.where(
            m.ones, torch.zeros(TOKENS, TOKENS), torch.full((TOKENS, TOKENS), -1e4)
        )
    ),
    "ones as numbers": lambda m: lambda x: torch.ones(TOKENS, TOKENS).to(torch.bool),
}
HIDING: dict[str, Callable[[Masked], Mask]] = {
    "causal": lambda m: lambda x: places(x)[:, None] >= places(x)[None, :],
    "of a weight": lambda m: lambda x: m.mixed[None, :].expand(TOKENS, -1),
    "of the input": lambda m: lambda x: (x[..., 0] > -1e9)[:, None, None, :],
    "all hidden but one": lambda m: lambda x: places(x)[None, :].ge(1).expand(TOKENS, -1),
    "a bias": lambda m: lambda x: torch.full((TOKENS, TOKENS), 0.5),
    "one minus one": lambda m: (
        lambda x: torch.add(torch.ones(TOKENS, TOKENS), torch.ones(TOKENS, TOKENS), alpha=-2)
    ),
}


def masks(given: Program) -> list[bool]:
    return [Attention(n).mask is not None for n in given.graph.nodes if n.target is SDPA]


@pytest.mark.parametrize("name", IDLE)
def test_an_idle_mask_goes_with_all_that_made_it(name: str) -> None:
    before = program(IDLE[name])
    after = without_idle_masks(before)
    assert masks(before) == [True]
    assert masks(after) == [False]
    made = [n.name for n in after.graph.nodes if n.op == "call_function"]
    assert not [n for n in made if n.startswith(("arange", "ge", "full", "where", "expand"))]
    x = {"x": torch.randn(3, TOKENS, WIDTH)}
    torch.testing.assert_close(after.run(x)["output"], before.run(x)["output"])
    assert without_idle_masks(after) is after


@pytest.mark.parametrize("name", HIDING)
def test_a_mask_that_may_hide_something_stays(name: str) -> None:
    before = program(HIDING[name])
    assert without_idle_masks(before) is before


OPERATORS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add, torch.mul, torch.ge, torch.gt, torch.le, torch.lt, torch.eq, torch.ne,
    torch.logical_and, torch.logical_or,
    lambda a, b: a.to(torch.float64) - b.to(torch.float64),
    lambda a, b: torch.where(a > b, a, b),
    lambda a, b: a.masked_fill(b.bool(), 7),
    lambda a, b: torch.cat([a, b]),
    lambda a, b: a.logical_not().to(torch.float32),
)  # fmt: skip


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(OPERATORS), st.integers(0, 9)), min_size=1, max_size=4
    ),
    fill=st.integers(-2, 2),
)
def test_bounds_hold(
    steps: list[tuple[Callable[[Tensor, Tensor], Tensor], int]], fill: int
) -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made = [torch.arange(4) - 1, torch.full((4,), fill), torch.zeros(4)]
            for operator, pick in steps:
                made.append(operator(made[-1 - pick % len(made)], made[pick % len(made)])[:4])
            return torch.stack([m.to(torch.float32) for m in made]) + 0 * x

    traced = trace(Chain(), {"x": torch.zeros(1)}, dynamic={}, info=SourceInfo("chain"))
    bounds, values = ValueBounds(traced), Recorder(traced.exported.module()).record(torch.zeros(1))
    known = 0
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.name in values:
            low, high = bounds.of(node)
            value = values[node.name].to(torch.float64)
            assert ((low <= value) & (value <= high)).all(), node.format_node()
            known += (low, high) != ANYTHING
    assert known >= len(steps)


class Recorder(torch.fx.Interpreter):
    """Values of all nodes by name."""

    def record(self, x: Tensor) -> dict[str, Tensor]:
        self.values: dict[str, Tensor] = {}
        self.run(x)
        return self.values

    def run_node(self, n: torch.fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.values[n.name] = value
        return value
