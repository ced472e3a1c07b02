"""A toy in float64, data for it, and modules with weights that nothing was trained for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy
from thresher.compiler.contract import Context
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models.data import Dataset
from thresher.passes.tokens.modules.method import LearnedReduction, places
from thresher.passes.tokens.reduce import Weights

ITEMS = 40


@cache
def toy(
    pool: str = "class", dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Toy, Program]:
    """Three blocks over ten tokens, or over nine without a class token."""
    torch.manual_seed(seed)
    model = Toy(Block(), Block(), Block(), pool=pool).to(dtype).eval()
    example = {"x": torch.randn(2, TOKENS, WIDTH, dtype=dtype)}
    program = trace(model, example, dynamic={"x": {0: "batch"}}, info=SourceInfo("toy"))
    return model, replace(program, info=replace(program.info, labels=("a", "b", "c", "d")))


def noise(items: int = ITEMS) -> Dataset:
    x = np.random.default_rng(0).standard_normal((items, TOKENS, WIDTH), np.float32)
    return Dataset("noise", items, np.arange(items) % 4, lambda chosen: {"x": x[list(chosen)]})


def context(checkpoints: Path | None = None, **given: Any) -> Context:
    return Context(data=noise(), batch=8, checkpoints=checkpoints, **given)


def arbitrary(method: LearnedReduction[Any], program: Program) -> Weights:
    """Random tensors for every module of a method's plan."""
    generator = torch.Generator().manual_seed(5)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        place.layer: {k: tensor(shape) for k, shape in method.module.shapes(place).items()}
        for place in places(method.plan(program))
    }


def doubles(module: Any) -> dict[str, Any]:
    return {name: tensor.double().numpy() for name, tensor in module.items()}
