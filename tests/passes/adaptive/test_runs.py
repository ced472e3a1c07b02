"""Learners that tokens run, token of the input by token, also where tokens were merged or dropped before."""

from __future__ import annotations

import numpy as np
import torch

from tests.compiler.toys import Block, Toy
from tests.passes.adaptive.test_acm import STEPS, context, converted, dense, inputs
from thresher.compiler.ledger import final_positions, token_maps
from thresher.compiler.pipeline import run
from thresher.compiler.recipe import parse_recipe
from thresher.passes.adaptive.runs import learners_run
from thresher.passes.depth.bypass import detours

ADAPTIVE = torch.ops.thresher.adaptive_mlp.default


class Watch(torch.fx.Interpreter):
    """Keeps what the gates of adaptive networks chose."""

    def run_node(self, n: torch.fx.Node) -> object:
        if n.target is ADAPTIVE:
            self.chosen = [*getattr(self, "chosen", []), self.env[n.args[1]].numpy()]  # type: ignore[index]
        return super().run_node(n)


def test_each_token_by_itself() -> None:
    watch = Watch(converted().exported.graph_module)
    with torch.no_grad():
        watch.run(*converted().placeholder_values(inputs()))
    found = learners_run(converted(), inputs())
    assert [runs.most for runs in found] == [4, 4]
    assert all("fc2" in runs.path for runs in found)
    for runs, chosen in zip(found, watch.chosen, strict=True):
        np.testing.assert_array_equal(runs.k, chosen)


def test_merged_and_dropped_tokens() -> None:
    settings = ", ".join(f"{key}: {value}" for key, value in STEPS.items())
    recipe = parse_recipe(f"passes: [{{evit: {{keep: 0.5}}}}, {{acm: {{{settings}}}}}]", "test")
    made = run(dense(), recipe, context())
    maps = token_maps(made, inputs())
    found = learners_run(made, inputs())
    for runs, where in zip(found, final_positions(maps, maps[0].slot.shape[1]), strict=True):
        assert runs.k.shape == where.shape
        np.testing.assert_array_equal(runs.k < 0, where < 0)
        for b in range(len(where)):
            together = {int(p): set(runs.k[b][where[b] == p]) for p in where[b] if p >= 0}
            assert all(len(values) == 1 for values in together.values())
    assert learners_run(dense(), inputs()) == []


def three_blocks() -> Toy:
    return Toy(Block(), Block(), Block())


def test_tokens_that_skip_a_block_run_none_of_its_learners() -> None:
    """Behind a merge in block 0: some of the 8 tokens that are left skip block 1."""
    settings = ", ".join(f"{key}: {value}" for key, value in STEPS.items())
    before = "{tome: {r: 2, layers: [0]}}, {skip-tokens: {layers: [1], router: random}}"
    recipe = parse_recipe(f"passes: [{before}, {{acm: {{{settings}}}}}]", "test")
    made = run(dense(three_blocks), recipe, context())
    first, second, third = learners_run(made, inputs())
    watch = Watch(made.exported.graph_module)
    with torch.no_grad():
        watch.run(*made.placeholder_values(inputs()))
    (merged,) = token_maps(made, inputs())
    (leave,) = detours(made)
    (aside,) = token_maps(made, inputs(), [leave])
    assert watch.chosen[1].shape == (3, aside.kept.shape[1])
    assert min(first.k.min(), third.k.min()) >= 0
    for b, token in np.ndindex(second.k.shape):
        runs = np.flatnonzero(aside.kept[b] == merged.slot[b, token])
        want = watch.chosen[1][b, runs[0]].clip(0, second.most) if len(runs) else -1
        assert second.k[b, token] == want
    assert 0 < (second.k < 0).sum() < second.k.size
