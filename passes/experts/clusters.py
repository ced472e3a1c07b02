"""Neurons that are like each other, in groups of one size: balanced k-means."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 20
Rows = NDArray[np.float64]
Groups = NDArray[np.intp]


def balanced(rows: Rows, count: int, seed: int) -> Groups:
    """``[count, H / count]``: the numbers of the rows ``[H, D]`` in each group, rising.

    Rows are scaled to length one, so that neurons are alike that open in the same direction.  Every
    round gives the pairs of row and centre out by falling similarity while there is room; this is no optimal
    assignment, and the best round is kept.  Two calls with one seed are equal.

    Raises:
        ValueError: the groups cannot have one size.
    """
    if len(rows) % count:
        raise ValueError(f"{len(rows)} rows make no {count} groups of one size")
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centres = _spread(unit, count, np.random.default_rng(seed))
    best, found = -np.inf, np.arange(len(rows)).reshape(count, -1)
    for _ in range(ROUNDS):
        similarity = unit @ centres.T
        group = _dealt(similarity, len(rows) // count)
        score = float(similarity[np.arange(len(rows)), group].sum())
        if score <= best + 1e-9:
            break
        best, found = score, np.argsort(group, kind="stable").reshape(count, -1)
        centres = unit[found].mean(1)
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return found


def _spread(unit: Rows, count: int, random: np.random.Generator) -> Rows:
    """Rows to begin from, drawn one by one by their squared distance to those before (k-means++)."""
    chosen = [int(random.integers(len(unit)))]
    for _ in range(count - 1):
        nearest = (unit @ unit[chosen].T).max(1)
        weight = np.maximum(2 - 2 * nearest, 0)
        total = weight.sum()
        share = weight / total if total > 1e-12 else np.full(len(unit), 1 / len(unit))
        chosen.append(int(random.choice(len(unit), p=share)))
    return unit[chosen]


def _dealt(similarity: Rows, room: int) -> Groups:
    """``[H]``: the group of each row, no group with more than ``room``."""
    rows, groups = similarity.shape
    found, left = np.full(rows, -1), np.full(groups, room)
    for pair in np.argsort(-similarity, axis=None, kind="stable"):
        row, group = divmod(int(pair), groups)
        if found[row] < 0 and left[group]:
            found[row] = group
            left[group] -= 1
    return found
