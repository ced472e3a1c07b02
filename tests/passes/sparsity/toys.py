"""Transformers of one or two blocks with every kind of feed-forward network, and noise to run on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from thresher.compiler.program import Program
from thresher.models.data import Dataset

HIDDEN, ITEMS = 2 * WIDTH, 24


class Gated(Block):
    """Gated with two linears, or with one that is cut in two; ``norm`` stands over the neurons."""

    def __init__(
        self,
        *,
        fused: bool = False,
        norm: bool = False,
        shown: bool = False,
        bias: bool = True,
        glu: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up,
    ) -> None:
        super().__init__()
        self.fused, self.shown, self.glu = fused, shown, glu
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.both = nn.Linear(WIDTH, 2 * HIDDEN, bias)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm = nn.LayerNorm(HIDDEN) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(y).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        gate, up = self.both(y).chunk(2, -1) if self.fused else (self.gate(y), self.up(y))
        hidden = self.norm(self.glu(gate, up))
        x = x + self.down(hidden)
        return x + hidden[..., :WIDTH] if self.shown else x


class Causal(nn.Module):
    """Next-token logits over 11 words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block = nn.Embedding(11, WIDTH), Block(causal=True)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.block(self.words(input_ids)))}


BLOCKS: dict[str, Callable[[], Block]] = {
    "plain": Block,
    "gated": Gated,
    "fused": lambda: Gated(fused=True),
    "llama": lambda: Gated(bias=False),
    "phi": lambda: Gated(fused=True, bias=False),
    "spelled": lambda: Gated(bias=False, glu=lambda gate, up: gate * torch.sigmoid(gate) * up),
    "entwined": lambda: Gated(glu=lambda gate, up: gate * (torch.sigmoid(gate) * up)),
    "normed": lambda: Gated(norm=True),
    "shown": lambda: Gated(shown=True),
}


@cache
def toy(*kinds: str, dynamic: bool = False, pool: str = "class") -> Program:
    """A transformer of these blocks, traced once; with random weights that are not tiny."""
    torch.manual_seed(1)
    made = Toy(*(BLOCKS[kind]() for kind in kinds), pool=pool)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return traced(made, dynamic=dynamic)


def noise(items: int = ITEMS, value: float | None = None) -> Dataset:
    """Inputs of the toys, unlabelled; ``value`` stands in the first entry of all."""
    x = np.random.default_rng(0).standard_normal((items, TOKENS, WIDTH), np.float32)
    if value is not None:
        x[:, 0, 0] = value
    return Dataset("noise", items, None, lambda chosen: {"x": x[list(chosen)]})


def labelled() -> Dataset:
    """The same with class numbers."""
    plain = noise()
    return Dataset("noise", ITEMS, np.arange(ITEMS) % 4, plain.read)


def sentences() -> Dataset:
    """Words for the causal toy."""
    ids = np.random.default_rng(0).integers(0, 11, (16, 12))
    return Dataset("words", 16, None, lambda chosen: {"input_ids": ids[list(chosen)]})
