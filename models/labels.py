"""Labels of data sets: numbers, ratings, or names that are matched with the model's classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from thresher.compiler.errors import UsageError, nearest

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def read_labels(words: Sequence[str], known: Sequence[str] | None, origin: str) -> Array:
    """``int64 [n]`` class numbers or ``float64 [n]`` ratings of labels written as text.

    Raises:
        UsageError: a word is not among the model's classes.
    """
    if all(re.fullmatch(r"\d+", word) for word in words):
        return np.array([int(word) for word in words], dtype=np.int64)
    try:
        return np.array([float(word) for word in words], dtype=np.float64)
    except ValueError:
        table = class_numbers(sorted(set(words)), known, origin)
        return np.array([table[word] for word in words], dtype=np.int64)


def class_numbers(found: Sequence[str], known: Sequence[str] | None, origin: str) -> dict[str, int]:
    """Class name to number: by the model's names where they fit, otherwise by sorted order.

    A model's name may begin with an identifier (``n01440764 tench``), which also stands for it.

    Raises:
        UsageError: the names do not fit the model's and their number is another.
    """
    digits = all(re.fullmatch(r"\d+", name) for name in found)
    if known is None:
        order = sorted(found, key=int) if digits else sorted(found)
        return {name: number for number, name in enumerate(order)}
    table = {name.split()[0].lower(): number for number, name in enumerate(known) if name.strip()}
    table |= {name.lower(): number for number, name in enumerate(known)}
    strange = [name for name in found if name.lower() not in table]
    if not strange:
        return {name: table[name.lower()] for name in found}
    if digits and all(int(name) < len(known) for name in found):
        return {name: int(name) for name in found}
    if len(found) == len(known):
        return class_numbers(found, None, origin)
    raise UsageError(
        f"{origin} has {len(found)} classes and the model {len(known)}, which does not name"
        f" {strange[0]!r}{nearest(strange[0], known)[:100]}"
    )


def check_labels(labels: Array, count: int, classes: int | None, origin: str) -> Array:
    """Labels as ``int64`` or ``float64``, one for each of ``count`` items.

    Raises:
        UsageError: their number or shape differs, or one lies outside the model's classes.
    """
    if labels.shape != (count,):
        raise UsageError(
            f"{origin} has {count} items and labels of shape {list(labels.shape)}: give one each"
        )
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise UsageError(f"{origin} has labels that are no numbers: remove those items")
        return labels.astype(np.float64)
    if labels.dtype.kind not in "iub":
        raise UsageError(f"the labels of {origin} are of type {labels.dtype}: give numbers")
    labels = labels.astype(np.int64)
    if count and (labels.min() < 0 or (classes and labels.max() >= classes)):
        worst = int(labels.min() if labels.min() < 0 else labels.max())
        limit = f"the model has {classes} classes" if classes else "classes count from 0"
        raise UsageError(f"{origin} has the label {worst}, and {limit}: give the matching data")
    return labels
