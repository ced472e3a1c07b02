"""A vision transformer small enough to be traced, lowered and run in every test of a verb."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tests.compiler.toys import WIDTH, Block, Toy
from tests.families.latents import Tokenizer
from thresher.models.spec import ModelSpec

SIDE, PATCH, CLASSES = 24, 4, ("ant", "bee", "cat", "dog")
PREPROCESSING: dict[str, Any] = {
    "kind": "image",
    "input": "x",
    "size": [SIDE, SIDE],
    "channels": 3,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


class ToyViT(nn.Module):
    """Patches of 4x4 pixels, a class token and three blocks: 37 tokens."""

    pool = "class"

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.encoder = Toy(Block(), Block(), Block(), pool=self.pool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.encoder(self.patches(x).flatten(2).transpose(1, 2))
        return logits


class Pooled(ToyViT):
    """The same without a class token: the mean of 36 tokens is read out."""

    pool = "mean"


class Convolutions(nn.Module):
    """No transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.conv(x).mean(dim=(2, 3)))
        return logits


def vit() -> nn.Module:
    """The transformer, the same in every call."""
    return _told(ToyViT)


def pooled() -> nn.Module:
    """The transformer without a class token."""
    return _told(Pooled)


def reseeded() -> nn.Module:
    """The transformer with other weights."""
    return _told(ToyViT, seed=1)


def convolutions() -> nn.Module:
    """The network that is no transformer."""
    return _told(Convolutions)


def tokenizer() -> nn.Module:
    """A 1-D image tokenizer with 12 latents."""
    return _told(Tokenizer, outputs=Tokenizer.outputs)


def _told(kind: type[nn.Module], seed: int = 0, outputs: Sequence[str] = ("logits",)) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind()
    spec = ModelSpec(
        example={"x": torch.zeros(2, 3, SIDE, SIDE)},
        outputs=list(outputs),
        preprocessing=PREPROCESSING,
        labels=CLASSES,
        licence="Apache-2.0",
    )
    model.thresher_spec = spec  # type: ignore[assignment]
    return model


def interrupted() -> nn.Module:
    """Stands for a user who presses Ctrl-C while a model is built."""
    os.kill(os.getpid(), signal.SIGINT)
    return vit()
