"""Inputs for the operators: hypothesis draws the structure, a seeded generator fills the arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]
PROTECTED = (0, 1, 2, 5)
KINDS = ("plain", "ties", "zero keys", "huge", "padding", "all padding")


class MergeCase(NamedTuple):
    """Arguments of ``bipartite_merge``, in order."""

    x: Array
    size: Array
    metric: Array
    keep: int
    protected: int
    by_index: bool


def fewest(tokens: int, protected: int) -> int:
    """The smallest count that merging can reach, counted one by one."""
    sources = [n for n in range(protected, tokens) if n % 2 == 0]
    targets = [n for n in range(protected, tokens) if n % 2 == 1]
    return tokens - (len(sources) if targets else 0)


@st.composite
def merge_cases(draw: st.DrawFn, dtype: str = "float32") -> MergeCase:
    protected = draw(st.sampled_from(PROTECTED))
    tokens = draw(st.integers(max(protected, 1), protected + 9))
    keep = draw(st.integers(fewest(tokens, protected), tokens))
    kind = draw(st.sampled_from(KINDS))
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3, 8)))
    heads, depth = draw(st.integers(1, 3)), draw(st.sampled_from((2, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    x = rng.standard_normal((batch, tokens, width))
    size = rng.integers(1, 60, (batch, tokens)) / draw(st.sampled_from((1, 3)))
    metric = rng.standard_normal((batch, heads, tokens, depth))
    if kind == "ties":  # equal in any arithmetic: powers of two along the axes
        axis = rng.integers(0, depth, (batch, 1, tokens))
        axes = np.arange(depth) == axis[..., None]
        metric = np.broadcast_to(axes * rng.choice([-1, 1, 4], (batch, 1, tokens, 1)), metric.shape)
    elif kind == "zero keys":
        metric[:, :, rng.random(tokens) < 0.5] = 0
    elif kind == "huge":
        metric = metric * (1e3 if dtype == "float16" else 1e15)
        x = x * (1e4 if dtype == "float16" else 1e30)
        size = size * 100
    elif kind == "padding":
        size[rng.random(size.shape) < 0.4] = 0
    elif kind == "all padding":
        size[:] = 0
    return MergeCase(
        x.astype(dtype),
        size.astype(np.float32),
        metric.astype(dtype),
        keep,
        protected,
        draw(st.booleans()),
    )


class KeepCase(NamedTuple):
    """Arguments of ``keep_tokens``, in order."""

    x: Array
    score: Array
    keep: int
    protected: int
    fuse: bool


@st.composite
def keep_cases(draw: st.DrawFn, dtype: str = "float32") -> KeepCase:
    protected, fuse = draw(st.sampled_from(PROTECTED)), draw(st.booleans())
    tokens = draw(st.integers(protected + int(fuse) + (protected == 0), protected + 9))
    keep = draw(st.integers(max(protected + int(fuse), 1), tokens))
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3, 8)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    score = rng.standard_normal((batch, tokens))
    kind = draw(st.sampled_from(("plain", "ties", "padding")))
    if kind == "ties":
        score = rng.integers(0, 3, (batch, tokens)) / 4
    elif kind == "padding":
        score[rng.random(score.shape) < 0.3] = -1e30
    x = rng.standard_normal((batch, tokens, width))
    if fuse:  # a dropped token times -1e30 would drown the others
        score = np.maximum(score, -100)
    return KeepCase(x.astype(dtype), score.astype(np.float32), keep, protected, fuse)


class PruneMergeCase(NamedTuple):
    """Arguments of ``prune_merge``, in order."""

    x: Array
    size: Array
    score: Array
    pruned: int
    keep: int
    protected: int


@st.composite
def prune_merge_cases(draw: st.DrawFn, dtype: str = "float32") -> PruneMergeCase:
    protected = draw(st.sampled_from(PROTECTED))
    tokens = draw(st.integers(max(protected, 1), protected + 9))
    pruned = draw(st.integers(max(protected, 1), tokens))
    keep = draw(st.integers(min(protected + 1, pruned), pruned))
    kind = draw(st.sampled_from(KINDS))
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from((2, 3, 8)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    x = rng.standard_normal((batch, tokens, width))
    size = 1 + rng.integers(0, 60, (batch, tokens)) / draw(st.sampled_from((1, 3)))
    score = rng.standard_normal((batch, tokens))
    if kind == "ties":  # equal in any arithmetic: powers of two along the axes
        axes = np.arange(width) == rng.integers(0, width, (batch, tokens, 1))
        x = axes * rng.choice([-1, 1, 4], (batch, tokens, 1))
        score = rng.integers(0, 3, (batch, tokens)) / 4
    elif kind == "zero keys":
        x[:, rng.random(tokens) < 0.5] = 0
    elif kind == "huge":
        x = x * (1e4 if dtype == "float16" else 1e15)
        size, score = size * 100, score * 1e30
    elif kind == "padding":
        size[rng.random(size.shape) < 0.4] = 0
    elif kind == "all padding":
        size[:] = 0
    return PruneMergeCase(
        x.astype(dtype),
        size.astype(np.float32),
        score.astype(np.float32),
        pruned,
        keep,
        protected,
    )


class DiverseCase(NamedTuple):
    """Arguments of ``select_diverse``, in order."""

    x: Array
    size: Array
    keep: int
    protected: int


@st.composite
def diverse_cases(draw: st.DrawFn, dtype: str = "float32") -> DiverseCase:
    protected = draw(st.sampled_from(PROTECTED))
    tokens = draw(st.integers(protected + 1, protected + 11))
    keep = draw(st.integers(protected + 1, tokens))
    kind = draw(st.sampled_from(KINDS))
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from((2, 3, 17)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    x = rng.standard_normal((batch, tokens, width))
    size = rng.integers(1, 60, (batch, tokens)) / 3
    if kind == "ties":  # equal in any arithmetic: powers of two along the axes
        axes = np.arange(width) == rng.integers(0, width, (batch, tokens, 1))
        x = axes * rng.choice([-1, 1, 4], (batch, tokens, 1))
    elif kind == "zero keys":
        x[:, rng.random(tokens) < 0.5] = 0
    elif kind == "huge":
        x = x * (1e4 if dtype == "float16" else 1e15)
    elif kind == "padding":
        size[rng.random(size.shape) < 0.4] = 0
    elif kind == "all padding":
        size[:] = 0
    return DiverseCase(x.astype(dtype), size.astype(np.float32), keep, protected)


class RedundantCase(NamedTuple):
    """Arguments of ``redundant_merge``, in order."""

    x: Array
    size: Array
    metric: Array
    score: Array
    keep: int
    protected: int


@st.composite
def redundant_cases(draw: st.DrawFn, dtype: str = "float32") -> RedundantCase:
    case = draw(merge_cases(dtype=dtype).filter(lambda one: one.x.shape[1] > one.protected))
    tokens = case.x.shape[1]
    keep = draw(st.integers(tokens - (tokens - case.protected) // 2, tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    score = rng.uniform(-1, 1, case.size.shape)
    if draw(st.booleans()):
        score = np.round(score * 2) / 2  # ties
    return RedundantCase(
        case.x, case.size, case.metric, score.astype(np.float32), keep, case.protected
    )


class EnergyCase(NamedTuple):
    """Arguments of ``token_energy``, in order."""

    metric: Array
    size: Array
    margin: float
    protected: int


@st.composite
def energy_cases(draw: st.DrawFn, dtype: str = "float32") -> EnergyCase:
    case = draw(merge_cases(dtype=dtype))
    margin = draw(st.sampled_from((0.0, 0.125, 0.625, 0.9375)))  # the same in float32
    return EnergyCase(case.metric, case.size, margin, case.protected)


class SoftCase(NamedTuple):
    """Arguments of ``soft_merge``, in order."""

    x: Array
    values: Array
    logits: Array
    protected: int


@st.composite
def soft_cases(draw: st.DrawFn, dtype: str = "float32") -> SoftCase:
    protected = draw(st.sampled_from(PROTECTED))
    tokens, means = draw(st.integers(protected + 1, protected + 11)), draw(st.integers(1, 7))
    kind = draw(st.sampled_from(("plain", "ties", "huge", "padding", "all padding")))
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from((1, 3, 17)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    x, values = rng.standard_normal((2, batch, tokens, width))
    logits = rng.standard_normal((batch, tokens, means))
    if kind == "ties":
        logits = np.zeros_like(logits)
    elif kind == "huge":
        logits, x = logits * 30, x * (1e4 if dtype == "float16" else 1e30)
    elif kind == "padding":
        logits[rng.random((batch, tokens)) < 0.4] = -1e4
    elif kind == "all padding":
        logits[:] = -1e4
    return SoftCase(x.astype(dtype), values.astype(dtype), logits.astype(np.float32), protected)
