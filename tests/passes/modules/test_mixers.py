"""PatchMerger and SiT: every token that stays is the mean that the formula says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from tests.passes.modules.cases import arbitrary, doubles, toy
from tests.passes.modules.oracle import MEANS, between
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context
from thresher.compiler.ledger import token_maps
from thresher.passes.tokens.modules.merger import PatchMerger
from thresher.passes.tokens.modules.method import LearnedReduction, ModuleOptions
from thresher.passes.tokens.modules.slimming import Sit

METHODS: dict[str, type[LearnedReduction[Any]]] = {"sit": Sit, "patch-merger": PatchMerger}
each = pytest.mark.parametrize("name", METHODS)


def method(name: str, **options: Any) -> LearnedReduction[Any]:
    return METHODS[name](ModuleOptions(**options))


@each
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_the_graph_computes_the_formula(name: str, pool: str) -> None:
    model, program = toy(pool)
    made = method(name, keep=0.6, layers=(0, 1))
    weights = arbitrary(made, program)
    result, _ = made.reduced(program, made.plan(program), weights)
    prefix = int(pool == "class")
    assert result.applied == 2
    assert result.details["tokens"] == [9 + prefix, 6 + prefix, 4 + prefix]

    def change(layer: int, tokens: Tensor) -> Tensor:
        if layer not in weights:
            return tokens
        w = doubles(weights[layer])
        means = [MEANS[name](item[prefix:].numpy(), w) for item in tokens]
        return torch.cat([tokens[:, :prefix], torch.from_numpy(np.stack(means))], dim=1)

    for batch in (1, 3):
        x = torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64)
        (found,) = result.program.run({"x": x}).values()
        torch.testing.assert_close(found, between(model, x, change), rtol=0, atol=1e-9)


@each
def test_what_the_step_costs_is_counted(name: str) -> None:
    _, program = toy()
    made = method(name, keep=0.6, layers=(0,))
    result, _ = made.reduced(program, made.plan(program), arbitrary(made, program))
    tokens, means, hidden = TOKENS + 1, 6, WIDTH // 2
    module = WIDTH * hidden + hidden * means if name == "sit" else WIDTH * means
    steps = tokens * (module + means * WIDTH)
    assert result.details["inserted_macs"] == steps
    assert total_macs(result.program.graph) == result.details["macs"] + steps


@each
def test_outputs_of_every_token_read_the_mean_that_it_lives_in(name: str) -> None:
    program = traced(Toy(pool="dense"))
    made = method(name, keep=0.4, layers=(0,))
    result, _ = made.reduced(program, made.plan(program), arbitrary(made, program))
    x = torch.randn(3, TOKENS, WIDTH)
    (dense,), (seen,) = result.program.run({"x": x}).values(), token_maps(result.program, {"x": x})
    assert dense.shape == (3, TOKENS + 1, 4)
    for item, slots in zip(dense, seen.slot.tolist(), strict=True):
        assert slots[0] == 0
        for n, slot in enumerate(slots):
            torch.testing.assert_close(item[n], item[slots.index(slot)], rtol=0, atol=0)
        assert len(item.unique(dim=0)) == len(set(slots))


@each
def test_refused_with_a_reason(name: str) -> None:
    made = method(name, keep=0.5)
    lengths = made.match(traced(Toy(), dynamic=True), Context())
    assert lengths.applied == 0
    assert "give a fixed --length" in lengths.refused[0].reason
    alone = made.match(traced(Toy(Block())), Context())
    assert alone.applied == 0
    assert "there is one block" in alone.refused[0].reason


def test_patch_merger_stands_in_the_middle() -> None:
    _, program = toy()
    assert method("patch-merger", keep=0.5).plan(program).counts == (6, 6)
    assert method("sit", keep=0.5).plan(program).counts == (6, 4)
