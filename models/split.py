"""Two halves of labelled data: one to choose on, one to report on."""

from __future__ import annotations

import dataclasses
import random

from thresher.compiler.errors import UsageError
from thresher.models.data import Dataset


def halves(dataset: Dataset, limit: int | None = None, seed: int = 0) -> tuple[Dataset, Dataset]:
    """A random half and the other, of at most ``limit`` items spread evenly over the set.

    Raises:
        UsageError: there are fewer than two items.
    """
    total = min(len(dataset), limit) if limit else len(dataset)
    if total < 2:
        raise UsageError(f"{dataset.name} has too few items to be split in two: give more")
    chosen = [index * len(dataset) // total for index in range(total)]
    random.Random(seed).shuffle(chosen)
    middle = (total + 1) // 2
    return subset(dataset, sorted(chosen[:middle])), subset(dataset, sorted(chosen[middle:]))


def subset(dataset: Dataset, items: list[int]) -> Dataset:
    """The items with these numbers, in this order."""
    return dataclasses.replace(
        dataset,
        count=len(items),
        labels=None if dataset.labels is None else dataset.labels[items],
        read=lambda chosen: dataset.read([items[i] for i in chosen]),
    )
