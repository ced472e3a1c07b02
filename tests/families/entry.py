"""What the tests know about one model of the zoo, and how its weights are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Pooling = Literal["class", "mean", "attention", "sequence", "tokens"]
Dynamic = Mapping[str, Mapping[int, str]]

_TABLES = ("token", "pos_embed", "position_embeddings", "latent", "bias_table")


class Inputs(Protocol):
    """Draws seeded inputs: forward keyword name -> tensor; seq is the length where there is one."""

    def __call__(self, batch: int = 2, seq: int | None = None) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Entry:
    """One model of the zoo and what a reader of its code knows about its tokens.

    Attributes:
        prefix: number of tokens in front that are never reduced.
        class_token: index of the prefix token that the model reads out, or None.
        pooling: how the output is read from the tokens; "tokens" is the full hidden state.
        layers: number of self-attention layers, each of which is a reduction site.
        post_norm: the residual stream is what leaves the LayerNorm behind each residual add.
        dense: names of the outputs that hold one row per token.
        dynamic: axes that may be symbolic, input name -> {axis: name}.
        real: (model, inputs) -> bool [B, N], False at padding; None when nothing is ever padded.
        positional: attention depends on positions (RoPE, relative bias, windows).
        tolerance: absolute; wider where the model itself computes in float32.
        refused: why no token may be reduced here, or None.
    """

    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    inputs: Inputs = field(repr=False)
    layers: int
    prefix: int = 0
    class_token: int | None = None
    pooling: Pooling = "class"
    post_norm: bool = False
    dense: tuple[str, ...] = ()
    dynamic: Dynamic = field(default_factory=dict)
    real: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None = field(
        default=None, repr=False
    )
    positional: bool = False
    tolerance: float = 1e-9
    refused: str | None = None

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Inputs]:
        """The model in eval mode, returning a dict of named tensors, and its inputs.

        Skips the calling test when the library the model comes from is not installed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
        randomise(model)
        return model.to(dtype).eval(), self.inputs


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Draw every parameter: gains in 0.5..1.5, matrices scaled by fan-in, the rest noisy."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                value = noise
            elif any(word in name for word in _TABLES):
                value = 0.5 * noise
            elif parameter.ndim < 2:
                gain = 0.5 + torch.rand(parameter.shape, generator=generator)
                value = 0.1 * noise if name.endswith("bias") else gain
            else:
                # a little above variance-preserving, so that attention is far from uniform
                value = 1.4 * noise / parameter[0].numel() ** 0.5
            parameter.copy_(value)


def draw(*shape: int) -> Tensor:
    """Standard normal numbers, float64, the same for the same shape."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def images(side: int, name: str) -> Inputs:
    """Square images [B, 3, side, side] under the given keyword."""

    def inputs(batch: int = 2, seq: int | None = None) -> dict[str, Tensor]:
        return {name: draw(batch, 3, side, side)}

    return inputs
