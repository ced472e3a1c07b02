"""The definitions as torch sees them: shapes, gradients, counts that are symbols, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

import thresher.kernels.ops  # noqa: F401
from tests.kernels.cases import (
    PROTECTED,
    fewest,
)

ops = torch.ops.thresher


def example(name: str) -> tuple[Any, ...]:
    x, size, metric = torch.randn(2, 9, 4), torch.rand(2, 9) + 0.5, torch.randn(2, 2, 9, 3)
    q, k = torch.randn(2, 2, 9, 3), torch.randn(2, 2, 9, 3)
    score, index, slot = (
        torch.rand(2, 9),
        torch.randint(0, 9, (2, 4)),
        torch.randint(-1, 9, (2, 12)),
    )
    cases: dict[str, tuple[Any, ...]] = {
        "bipartite_merge": (x, size, metric, 6, 1, True),
        "class_attention": (q, k, torch.randn(2, 1, 1, 9), 0.5, 0),
        "split_merge": (x, size, metric, score, 6, 1),
        "token_energy": (metric, size, 0.4, 1),
        "keep_tokens": (x, score, 6, 1, True),
        "prune_merge": (x, size, score, 7, 5, 1),
        "gather_tokens": (x, index),
        "restore_tokens": (x, slot, torch.randn(2, 12, 4)),
    }
    return cases[name]


NAMES = (
    "bipartite_merge",
    "class_attention",
    "split_merge",
    "token_energy",
    "keep_tokens",
    "prune_merge",
    "gather_tokens",
    "restore_tokens",
)


@pytest.mark.parametrize("name", NAMES)
def test_torch_accepts_the_registration(name: str) -> None:
    arguments = tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in example(name)
    )
    opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    arguments = [
        a.double().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in example(name)
    ]

    def function(*inputs: Any) -> Any:
        results = getattr(ops, name)(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r for r in results if r.is_floating_point())

    assert torch.autograd.gradcheck(function, tuple(arguments))


def test_counts_may_be_symbols() -> None:
    class Shorten(torch.nn.Module):
        def forward(self, x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor) -> Any:
            y, size, _, _ = ops.bipartite_merge(x, size, metric, x.shape[1] - 2, 1, True)
            y, size, *_ = ops.prune_merge(y, size, size, y.shape[1] - 1, y.shape[1] - 2, 1)
            return ops.keep_tokens(y, size, y.shape[1] - 1, 1, False)[0]

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=8)
    axes = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch, 2: tokens})
    example = (torch.randn(2, 9, 4), torch.ones(2, 9), torch.randn(2, 2, 9, 3))
    program = torch.export.export(Shorten(), example, dynamic_shapes=axes).run_decompositions({})
    larger = (torch.randn(3, 14, 4), torch.ones(3, 14), torch.randn(3, 2, 14, 3))
    assert program.module()(*larger).shape == (3, 9, 4)


@pytest.mark.parametrize("protected", PROTECTED)
def test_counts_that_cannot_be_reached_are_refused_with_the_range(protected: int) -> None:
    tokens = 11
    x, size, metric = torch.randn(1, tokens, 2), torch.ones(1, tokens), torch.randn(1, 1, tokens, 2)
    least = fewest(tokens, protected)
    for wrong in (least - 1, tokens + 1):
        with pytest.raises(ValueError, match=f"from {least} to {tokens} are possible"):
            ops.bipartite_merge(x, size, metric, wrong, protected, True)
    for wrong in (protected, tokens + 1):
        with pytest.raises(ValueError, match=f"from {protected + 1} to {tokens} are possible"):
            ops.keep_tokens(x, size, wrong, protected, True)
    for pruned, keep in ((8, 9), (tokens + 1, 9), (8, protected), (protected - 1, protected - 1)):
        with pytest.raises(ValueError, match=f"<= keep <= pruned <= {tokens} is possible"):
            ops.prune_merge(x, size, size, pruned, keep, protected)


def test_other_nonsense_is_refused_with_the_reason() -> None:
    q = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="row 4 is not one of the 4 queries"):
        ops.class_attention(q, q, None, 1.0, 4)
    with pytest.raises(ValueError, match="a prefix of 5 is none of 4 tokens"):
        ops.token_energy(q, torch.ones(1, 4), 0.5, 5)
    with pytest.raises(ValueError, match="x has rank 1"):
        ops.gather_tokens(torch.randn(3), torch.zeros(1, 2, dtype=torch.int64))
