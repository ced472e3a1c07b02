"""Seeded random inputs for comparing and timing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.runtime.feeds import PLUS
from thresher.runtime.manifest import Ranges, TensorInfo

LENGTH = 64  # of symbolic axes other than the batch, such as the number of words
STEP = {"past": 256, "sequence": 1}
VOCABULARY = 100  # whole-number inputs stay below this: every embedding table is larger


def random_inputs(
    specs: Sequence[TensorInfo],
    *,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    ranges: Ranges | None = None,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Standard normal floats and small whole numbers; masks are all ones, types all zeros, and
    positions count from 0.

    Args:
        specs: the inputs wanted.
        batch: size of the symbol on axis 0 of the first input.
        sizes: sizes of other symbols; by default 64, or the nearest allowed size.
        ranges: allowed sizes of the symbols.
        seed: of the generator.
    """
    rng = np.random.default_rng(seed)
    known = dict(sizes or {})
    symbol = batch_symbol(specs)
    if symbol is not None:
        known.setdefault(symbol, batch)
    shapes = [[_size(axis, known, ranges or {}) for axis in spec.shape] for spec in specs]
    return {spec.name: _fill(spec, shape, rng) for spec, shape in zip(specs, shapes, strict=True)}


def timed_sizes(
    specs: Sequence[TensorInfo],
    given: Mapping[str, int] | None,
    preprocessing: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Sizes of symbolic axes to time at: of a language model, one step behind 256 tokens.

    There are fewer tokens where it knows fewer positions, which its preprocessing says.
    """
    axes, wanted = {axis for spec in specs for axis in spec.shape}, dict(given or {})
    if not STEP.keys() <= axes:
        return wanted
    sizes = {**STEP, **wanted}
    known = (preprocessing or {}).get("positions")
    if known is not None and "past" not in wanted:
        sizes["past"] = max(0, min(sizes["past"], known - sizes["sequence"]))
    return sizes


def batch_symbol(specs: Sequence[TensorInfo]) -> str | None:
    """Name of axis 0 of the first input, or None when its size is fixed."""
    first = specs[0].shape[0] if specs and specs[0].shape else None
    return first if isinstance(first, str) else None


def _size(axis: int | str, known: Mapping[str, int], ranges: Ranges) -> int:
    if isinstance(axis, int):
        return axis
    if axis in known:
        return known[axis]
    if PLUS in axis:
        return sum(_size(part, known, ranges) for part in axis.split(PLUS))
    low, high = ranges.get(axis, (1, None))
    return max(low, LENGTH if high is None else min(LENGTH, high))


def _fill(spec: TensorInfo, shape: list[int], rng: np.random.Generator) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "b" or "mask" in spec.name:
        return np.ones(shape, dtype)
    if "type" in spec.name:
        return np.zeros(shape, dtype)
    if "position" in spec.name:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    return rng.integers(0, VOCABULARY, shape).astype(dtype)
