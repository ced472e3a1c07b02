"""Which sizes an engine is built for.

``x=8x3x224x224`` fixes the batch of the input ``x``; ``x=1..32x3x224x224@8`` is a range, and the size
that is usual within it, which back ends that tune for one size take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from thresher.compiler.errors import UsageError, nearest
from thresher.runtime.feeds import PLUS, describe
from thresher.runtime.manifest import Ranges, TensorInfo

FORM = "NAME=8x3x224x224, or NAME=1..32x3x224x224@8 with ranges and the usual sizes of these"
_AXIS = re.compile(r"(\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class Shapes:
    """Allowed sizes of symbolic axes, and the usual size of some."""

    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    usual: dict[str, int] = field(default_factory=dict)


def narrowed(given: Sequence[str], specs: Sequence[TensorInfo], ranges: Ranges) -> Shapes:
    """What ``--shape`` asks for, within what the model allows.

    Args:
        given: one text for each input that is named.
        specs: the model's inputs.
        ranges: sizes of symbolic axes that the model allows.

    Raises:
        UsageError: a text is malformed, names no input, does not fit its axes, or asks for sizes that
            the model does not take or that another text excludes.
    """
    known = {spec.name: spec for spec in specs}
    found: dict[str, tuple[int, int]] = {}
    usual: dict[str, int] = {}
    sums: list[tuple[str, str, int, int]] = []
    for text in given:
        name, equals, shape = text.partition("=")
        if not equals:
            raise UsageError(f"--shape {text}: write {FORM}")
        if name not in known:
            raise UsageError(f"--shape {text}: there is no input {name!r}{nearest(name, known)}")
        for axis, low, high, best in _axes(text, shape, known[name]):
            if PLUS in axis:
                sums.append((text, axis, low, high))
                continue
            allowed_low, allowed_high = ranges.get(axis, (1, None))
            if low < allowed_low or (allowed_high is not None and high > allowed_high):
                allowed = f"{allowed_low}..{'' if allowed_high is None else allowed_high}"
                raise UsageError(f"--shape {text}: {axis} can be {allowed}, not {low}..{high}")
            if found.setdefault(axis, (low, high)) != (low, high):
                first = "..".join(map(str, found[axis]))
                raise UsageError(f"--shape {text}: {axis} is {low}..{high} here and {first} before")
            if best is not None:
                usual[axis] = best
    chosen = {**ranges, **found}
    tied = {axis for spec in specs for axis in spec.shape if isinstance(axis, str) and PLUS in axis}
    for axis in sorted(tied):
        chosen[axis], best = _sum(axis, chosen, usual)
        if best is not None:
            usual[axis] = best
    for text, axis, low, high in sums:
        if (low, high) != chosen[axis]:
            least, most = chosen[axis]
            allowed = f"{least}..{'' if most is None else most}"
            raise UsageError(f"--shape {text}: {axis} is {allowed} together, not {low}..{high}")
    return Shapes(chosen, usual)


def _sum(
    axis: str, ranges: Ranges, usual: Mapping[str, int]
) -> tuple[tuple[int, int | None], int | None]:
    """Bounds of an axis that is as long as others together, and its usual size if each has one."""
    parts = axis.split(PLUS)
    lows, highs = zip(*(ranges.get(part, (1, None)) for part in parts), strict=True)
    most = None if None in highs else sum(highs)
    best = sum(usual[part] for part in parts) if all(part in usual for part in parts) else None
    return (sum(lows), most), best


def _axes(text: str, shape: str, spec: TensorInfo) -> list[tuple[str, int, int, int | None]]:
    """The symbolic axes of one input, each with its range and its usual size if that is told."""
    body, at, after = shape.partition("@")
    parts = [_AXIS.fullmatch(part) for part in body.split("x")]
    best = after.split("x") if at else []
    if not all(parts) or not all(part.isdecimal() for part in best):
        raise UsageError(f"--shape {text}: write {FORM}")
    if len(parts) != len(spec.shape):
        raise UsageError(
            f"--shape {text}: {spec.name} has {len(spec.shape)} axes and not {len(parts)}:"
            f" {describe(spec)}"
        )
    found: list[tuple[str, int, int, int | None]] = []
    for part, axis in zip(parts, spec.shape, strict=True):
        assert part is not None
        low, high = int(part[1]), int(part[2] or part[1])
        if isinstance(axis, int):
            if (low, high) != (axis, axis):
                raise UsageError(f"--shape {text}: an axis is {axis} and fixed: {describe(spec)}")
        elif low > high:
            raise UsageError(f"--shape {text}: {part[0]} is an empty range")
        else:
            found.append((axis, low, high, low if low == high else None))
    open_axes = [entry for entry in found if entry[1] != entry[2]]
    if at and len(best) != len(open_axes):
        raise UsageError(
            f"--shape {text}: {len(open_axes)} axes have a range and {len(best)} usual sizes are given"
        )
    told = dict(zip((axis for axis, *_ in open_axes), map(int, best), strict=False))
    for axis, low, high, _ in open_axes:
        if axis in told and not low <= told[axis] <= high:
            raise UsageError(f"--shape {text}: the usual size {told[axis]} is not in {low}..{high}")
    return [(axis, low, high, told.get(axis, one)) for axis, low, high, one in found]
