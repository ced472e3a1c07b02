"""Halves of a data set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.compiler.errors import UsageError
from thresher.models.data import Dataset
from thresher.models.split import halves


def numbered(count: int) -> Dataset:
    """Items ``x = 10 i`` with the label i."""
    return Dataset("d", count, np.arange(count), lambda items: {"x": 10 * np.array(items)})


@given(st.integers(2, 60), st.none() | st.integers(2, 80), st.integers(0, 3))
def test_halves_are_disjoint_and_keep_labels_with_their_items(
    count: int, limit: int | None, seed: int
) -> None:
    used: list[int] = []
    parts = halves(numbered(count), limit, seed)
    for part in parts:
        for inputs, labels in part.batches(7):
            assert labels is not None
            assert list(inputs["x"]) == [10 * label for label in labels]
            used += list(labels)
    total = min(count, limit or count)
    assert sorted(used) == [i * count // total for i in range(total)]
    assert len(parts[0]) - len(parts[1]) in (0, 1)


def test_halves_depend_on_the_seed_alone() -> None:
    first, again, other = (halves(numbered(40), None, seed)[0].labels for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    assert list(first) == list(again)
    assert list(first) != list(other)


def test_one_item_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="too few items"):
        halves(numbered(40), 1)
