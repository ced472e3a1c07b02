"""Checks what a user feeds an engine, and says in one sentence what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import UsageError, nearest
from thresher.runtime.manifest import Ranges, TensorInfo

Array = NDArray[Any]
ANY = "?"  # an axis without a name: any size, related to no other axis
PLUS = " + "  # between the symbols of an axis that is as long as theirs together


def checked(
    given: Mapping[str, Array], specs: Sequence[TensorInfo], ranges: Ranges | None = None
) -> dict[str, Array]:
    """Arrays in the dtype and layout that the engine wants; equal symbols must have equal sizes.

    Raises:
        UsageError: an input is unknown, missing, or has the wrong dtype, rank or size.
    """
    known = {spec.name: spec for spec in specs}
    for name in given:
        if name not in known:
            raise UsageError(f"there is no input {name!r}{nearest(name, known)}")
    missing = [name for name in known if name not in given]
    if missing:
        raise UsageError(f"the input {missing[0]!r} {describe(known[missing[0]])} is missing")
    sizes: dict[str, tuple[int, str]] = {}
    feeds: dict[str, Array] = {}
    for name, spec in known.items():
        value = np.asarray(given[name])
        _check_shape(value.shape, spec, ranges or {}, sizes)
        feeds[name] = _cast(value, spec)
    _check_sums(sizes)
    return feeds


def describe(spec: TensorInfo) -> str:
    """``"float32[batch, 3, 224, 224]"``."""
    return f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"


def _check_shape(
    shape: tuple[int, ...], spec: TensorInfo, ranges: Ranges, sizes: dict[str, tuple[int, str]]
) -> None:
    if len(shape) != len(spec.shape):
        raise UsageError(
            f"the input {spec.name!r} has {len(shape)} axes {list(shape)}"
            f" and needs {len(spec.shape)}: {describe(spec)}"
        )
    for axis, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
        place = f"axis {axis} of the input {spec.name!r}"
        if isinstance(wanted, int):
            if size != wanted:
                raise UsageError(f"{place} is {size} and must be {wanted}: {describe(spec)}")
            continue
        low, high = ranges.get(wanted, (1, None))
        if size < low or (high is not None and size > high):
            allowed = f"{low} to {high}" if high is not None else f"at least {low}"
            raise UsageError(f"{place} ({wanted}) is {size} and must be {allowed}")
        if wanted == ANY:
            continue
        first, where = sizes.setdefault(wanted, (size, place))
        if size != first:
            raise UsageError(f"{place} ({wanted}) is {size} and {where}, the same axis, is {first}")


def _check_sums(sizes: Mapping[str, tuple[int, str]]) -> None:
    for wanted, (size, place) in sizes.items():
        parts = wanted.split(PLUS)
        if len(parts) > 1 and all(part in sizes for part in parts):
            total = sum(sizes[part][0] for part in parts)
            if size != total:
                raise UsageError(f"{place} ({wanted}) is {size} and must be {total}")


def _cast(value: Array, spec: TensorInfo) -> Array:
    """Contiguous, in the wanted dtype.  Between floats and between integers only: whole numbers
    given for a float input are nearly always pixels that were not normalised."""
    wanted = np.dtype(spec.dtype)
    if value.dtype != wanted:
        if not _safe(value, wanted):
            raise UsageError(
                f"the input {spec.name!r} is {value.dtype} and must be {wanted}:"
                f" convert it (array.astype({wanted.name!r})) if its values mean the same"
            )
        value = value.astype(wanted)
    return np.ascontiguousarray(value)


def _safe(value: Array, wanted: np.dtype[Any]) -> bool:
    if value.dtype.kind == wanted.kind == "f":
        return True
    if value.dtype.kind in "iu" and wanted.kind in "iu":
        bounds = np.iinfo(wanted)
        return value.size == 0 or (value.min() >= bounds.min and value.max() <= bounds.max)
    return bool(value.dtype.kind == "b" and wanted.kind in "iu")
