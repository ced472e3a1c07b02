"""The ledger: sites in the order in which they run, and where tokens are behind them."""

from __future__ import annotations

import numpy as np
import torch

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from thresher.compiler.ledger import final_positions, token_maps
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program
from thresher.compiler.recipe import parse_recipe

X = {"x": torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))}


def reduced(passes: str) -> Program:
    program = traced(Toy(*(Block() for _ in range(4))))
    return optimize(program, parse_recipe(f"passes: [{passes}]", "test"))


def test_a_later_pass_may_reduce_earlier_and_by_the_same_operator() -> None:
    """The site that was there before needs every token, and gets them back."""
    made = reduced("topk-norm: {layers: [3], keep: 0.5}, random: {layers: [0], keep: 0.7}")
    order = [node.name for node in made.graph.nodes]
    assert [entry.layer for entry in made.ledger] == [0, 3]
    assert order.index(made.ledger[0].node) < order.index(made.ledger[1].node)
    maps = token_maps(made, X)
    assert [(one.slot.shape[1], one.kept.shape[1]) for one in maps] == [(10, 8), (10, 6)]
    for found, one in zip(final_positions(maps, TOKENS + 1), maps, strict=True):
        np.testing.assert_array_equal(found, one.slot)


def test_sites_that_follow_each_other_compose() -> None:
    made = reduced("random: {layers: [0], keep: 0.7}, topk-norm: {layers: [2], keep: 0.5}")
    first, second = token_maps(made, X)
    alive = [set(np.take_along_axis(first.kept, second.kept, 1)[b].tolist()) for b in range(2)]
    for b, found in enumerate(final_positions([first, second], TOKENS + 1)[-1]):
        assert set(np.flatnonzero(found >= 0).tolist()) == alive[b]
        kept = first.kept[b][second.kept[b]]
        assert found[kept].tolist() == list(range(len(kept)))
