"""Toys that tokens were taken from, and heads that nothing was trained for."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler.toys import HEADS, TOKENS, WIDTH, Block, Toy
from tests.passes.clca.oracle import Host
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program, Refusal, SourceInfo
from thresher.compiler.recipe import parse_recipe
from thresher.compiler.trace import trace
from thresher.passes.tokens.clca.head import learned
from thresher.passes.tokens.clca.place import Place, find_place

CLASSES = 4


class Biased(nn.Module):
    """A relative-position bias for all pairs of the ten tokens, in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy()
        self.bias = nn.Parameter(torch.randn(1, HEADS, TOKENS + 1, TOKENS + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.toy.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.toy.blocks:
            assert isinstance(block, Block)
            shape = (x.shape[0], x.shape[1], 3, HEADS, WIDTH // HEADS)
            q, k, v = block.qkv(block.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
            x = x + block.proj(y.transpose(1, 2).flatten(2))
            x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        logits: torch.Tensor = self.toy.head(self.toy.norm(x)[:, 0])
        return logits


@cache
def model(depth: int) -> Toy:
    torch.manual_seed(depth)
    return Toy(*(Block() for _ in range(depth))).double().eval()


@cache
def dense(depth: int, tokens: int, dtype: torch.dtype = torch.float64) -> Program:
    """A toy of so many blocks over a class token and patches."""
    example = {"x": torch.randn(2, tokens, WIDTH, dtype=dtype)}
    toy = copy.deepcopy(model(depth)).to(dtype)
    program = trace(toy, example, dynamic={"x": {0: "batch"}}, info=SourceInfo("toy"))
    return replace(program, info=replace(program.info, labels=("a", "b", "c", "d")))


def reduced(program: Program, passes: str) -> Program:
    return optimize(program, parse_recipe(f"passes: [{passes}]", "test"))


def place(program: Program, *, cached: bool = True) -> Place:
    found = find_place(program, "clca", cache=cached)
    assert not isinstance(found, Refusal), found
    return found


def host(program: Program) -> Host:
    """The reduction of a Program as the oracle knows it."""
    method = program.ledger[0].method
    return Host(method, {entry.layer: int(entry.tokens_out) for entry in program.ledger})


def arbitrary(tokens: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A head over so many class tokens, statistics for its norms, and a token; all random."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {name: tensor(shape) for name, shape in learned(WIDTH, tokens, CLASSES).items()}
    mixed = 2 * WIDTH
    stats = {
        "mean": tensor((WIDTH,)), "var": tensor((WIDTH,)).square(),
        "mixed_mean": tensor((mixed,)), "mixed_var": tensor((mixed,)).square(),
    }  # fmt: skip
    return weights, stats, tensor((WIDTH,))


def plain(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}
