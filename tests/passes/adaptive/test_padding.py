"""Padding trains nothing: what stands in padded tokens changes neither losses nor modules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler.toys import HEADS, TOKENS, WIDTH, Block
from tests.passes.adaptive.test_acm import STEPS, context, same
from thresher.compiler.contract import Context
from thresher.compiler.program import Program, SourceInfo, stored_tensors
from thresher.compiler.trace import trace
from thresher.models.data import Dataset
from thresher.passes.adaptive.job import AcmOptions, Distilled, Job
from thresher.passes.adaptive.losses import Choice, budget, diversity, negative_entropy, share
from thresher.passes.adaptive.sites import adaptable
from thresher.passes.adaptive.train import distil
from thresher.passes.sparsity.relufy import Relufy, RelufyOptions

ITEMS = 20
LONG = np.random.default_rng(3).integers(3, TOKENS + 1, ITEMS)
MASK = np.arange(TOKENS) < LONG[:, None]


class Masked(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, WIDTH))
        result: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return result


class Words(nn.Module):
    """A vector for each token, those of padding among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Masked(), Masked()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        mask = torch.where(attention_mask[:, None, None, :] > 0, 0.0, -1e9)
        found: Tensor = self.second(self.first(x, mask), mask)
        return found


def words() -> Program:
    torch.manual_seed(1)
    given = {
        "x": torch.randn(2, TOKENS, WIDTH),
        "attention_mask": torch.ones(2, TOKENS, dtype=torch.int64),
    }
    axes = {name: {0: "batch"} for name in given}
    return trace(Words(), given, dynamic=axes, info=SourceInfo("words"))


def padded(filler: float) -> Dataset:
    x = np.random.default_rng(0).standard_normal((ITEMS, TOKENS, WIDTH), np.float32)
    x = np.where(MASK[..., None], x, np.float32(filler))
    arrays: dict[str, np.ndarray] = {"x": x, "attention_mask": MASK.astype(np.int64)}
    return Dataset(
        "words", ITEMS, None, lambda chosen: {n: a[list(chosen)] for n, a in arrays.items()}
    )


def trained(program: Program, filler: float) -> Distilled:
    given, options = replace(context(padded(filler)), batch=4), AcmOptions(**STEPS)
    return distil(Job(program, adaptable(program, 4).ffns, options, given))


def test_what_stands_in_padding_changes_nothing() -> None:
    program = words()
    assert same(trained(program, 0.0), trained(program, 7.0))


def test_relufy_trains_on_no_padding() -> None:
    program = words()
    first, other = (
        Relufy(RelufyOptions(steps=3, rate=1e-2))(program, Context(data=padded(filler), batch=4))
        for filler in (0.0, 7.0)
    )
    assert first.details == other.details
    ours, theirs = (stored_tensors(done.program.exported) for done in (first, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_dead_tokens_count_nowhere() -> None:
    generator = torch.Generator().manual_seed(0)

    def choices(tokens: int) -> list[Tensor]:
        drawn = torch.randint(0, 5, (2, 3, tokens), generator=generator)
        return [F.one_hot(d, 5).double() for d in drawn]

    live, dead = choices(4), choices(2)
    alive = torch.ones(3, 6, dtype=torch.float64)
    alive[:, 4:] = 0
    short = [Choice(c, alive[:, :4], 7) for c in live]
    padded = [Choice(torch.cat([c, d], 1), alive, 7) for c, d in zip(live, dead, strict=True)]
    for term in (share, negative_entropy, diversity, lambda c: budget(c, 0.3)):
        torch.testing.assert_close(term(padded), term(short))
