"""DTEM: ToMe by another metric; soft groups become its hard ones as the temperatures fall."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from tests.passes.modules.cases import arbitrary, context, toy
from thresher.compiler.contract import Context
from thresher.compiler.program import stored_tensors
from thresher.passes.tokens.methods import Tome, TomeOptions
from thresher.passes.tokens.modules.embedding import Dtem, Grouping, soft_groups
from thresher.passes.tokens.modules.job import Job
from thresher.passes.tokens.modules.method import ModuleOptions, places

COUNTS = (8, 7, 6)  # of ten tokens


def method(**options: Any) -> Dtem:
    return Dtem(ModuleOptions(**options))


def keys_as_embedding(model: Toy) -> dict[int, dict[str, torch.Tensor]]:
    """The mean over the heads of what makes the keys, in which DTEM is ToMe."""
    found = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        weight, bias = block.qkv.weight.detach(), block.qkv.bias.detach()
        rows = slice(WIDTH, 2 * WIDTH)
        found[layer] = {
            "weight": weight[rows].view(2, -1, WIDTH).mean(0),
            "bias": bias[rows].view(2, -1).mean(0),
        }
    return found


def test_with_the_keys_for_an_embedding_it_is_tome() -> None:
    model, program = toy()
    made = method(counts=COUNTS)
    result, _ = made.reduced(program, made.plan(program), keys_as_embedding(model))
    tome = Tome(TomeOptions(counts=COUNTS))(program, Context())
    assert result.details["tokens"] == tome.details["tokens"] == [10, *COUNTS]
    x = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    (ours,), (theirs,) = (r.program.run({"x": x}).values() for r in (result, tome))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    other, _ = made.reduced(program, made.plan(program), arbitrary(made, program))
    assert not torch.allclose(next(iter(other.program.run({"x": x}).values())), theirs)
    tokens = sum((10, *COUNTS[:2]))
    extra = other.details["inserted_macs"] - tome.details["inserted_macs"]
    assert extra == tokens * WIDTH * WIDTH // 2


def test_an_untrained_embedding_is_the_keys() -> None:
    _, program = toy(dtype=torch.float32)
    made = method(counts=COUNTS, steps=0)(program, context())
    tome = Tome(TomeOptions(counts=COUNTS))(program, Context())
    x = torch.randn(8, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    (ours,), (theirs,) = (r.program.run({"x": x}).values() for r in (made, tome))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_hard_groups_are_the_step(pool: str) -> None:
    """In the limit the training computes what the graph does, sizes in attention and pooling included."""
    _, program = toy(pool, dtype=torch.float32)
    made = method(r=2)
    plan = made.plan(program)
    weights = arbitrary(made, program)
    job = Job("dtem", program, plan, made.module, places(plan), made.options, Context())
    result, _ = made.reduced(program, plan, weights)
    x = torch.randn(4, TOKENS, WIDTH)
    outputs, penalty = Grouping(job, 0.3, 1e-3).trained({"x": x}, weights, torch.Generator())
    (found,), (wanted,) = outputs.values(), result.program.run({"x": x}).values()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert float(penalty) == 0


def test_soft_groups_pick_as_many_as_asked_and_no_source_twice() -> None:
    score = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for count in (1, 3, 6):
        joins = soft_groups(score, count, 0.1, 0.1)
        assert float(joins.min()) >= 0
        assert float(joins.sum(-1).max()) <= 1 + 1e-6
        hard = soft_groups(score, count, 0.3, 1e-3)
        best = score.amax(-1)
        first = best.argsort(dim=1, descending=True)[:, :count]
        wanted = torch.zeros_like(score)
        for b, sources in enumerate(first.tolist()):
            for s in sources:
                wanted[b, s, int(score[b, s].argmax())] = 1
        torch.testing.assert_close(hard, wanted, rtol=0, atol=1e-5)


def test_training_moves_the_embeddings_and_nothing_else() -> None:
    _, program = toy(dtype=torch.float32)
    result = method(counts=COUNTS, steps=5)(program, context())
    untrained = method(counts=COUNTS, steps=0)(program, context()).calibration
    assert result.calibration is not None
    assert untrained is not None
    tensors = result.calibration.tensors
    moved = {name for name, t in untrained.tensors.items() if not torch.equal(t, tensors[name])}
    # no class token sees what merges behind the last attention
    assert moved == {f"{name}.{layer}" for name in ("weight", "bias") for layer in (0, 1)}
    before, after = (stored_tensors(p.exported) for p in (program, result.program))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


class Product(nn.Module):
    """A projection that is no linear of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_keys_of_no_linear_are_refused() -> None:
    model = Toy()
    model.blocks[1].qkv = Product()
    result = method(counts=(8, 7)).match(traced(model), Context())
    assert result.applied == 0
    assert "the keys of block 1 come from no linear" in result.refused[0].reason
    assert "use tome" in result.refused[0].reason
