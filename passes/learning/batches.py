"""Training and held-out items of a data set, in an order that follows from the seed alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.contract import Dataset
from thresher.compiler.errors import UsageError

LEAST_ITEMS = 5  # of which one is held out
HELD_OUT = 256  # items at most that no training sees, unless it asks; a fifth of the data at most
Batch = tuple[dict[str, Tensor], Tensor | None]


class Batches:
    """Batches of ``size`` items per process.

    Raises:
        UsageError: there are too few items to hold one out.
    """

    def __init__(
        self, data: Dataset, size: int, seed: int, *, labels: bool, held: int = HELD_OUT
    ) -> None:
        self.data, self.seed, self.labels = data, seed, labels
        if len(data) < LEAST_ITEMS:
            raise UsageError(
                f"{data.name} has {len(data)} items and training needs at least"
                f" {LEAST_ITEMS} items, as a fifth is held out: give more data"
            )
        order = self._shuffled(range(len(data)), -1)
        out = min(held, len(data) // LEAST_ITEMS)
        self.held, self.trained = order[:out], order[out:]
        self.size = min(size, len(self.trained) // workers.count() or 1)
        self._epoch, self._order = -1, list[int]()

    def at(self, step: int) -> Batch:
        """What this process trains on in a step."""
        first = (step * workers.count() + workers.rank()) * self.size
        return self._items([self._place(first + i) for i in range(self.size)])

    def held_out(self) -> Iterator[Batch]:
        """Everything that is held out."""
        return self._pieces(self.held)

    def sample(self) -> Iterator[Batch]:
        """As many items of those that are trained on."""
        return self.first(len(self.held))

    def first(self, items: int) -> Iterator[Batch]:
        """So many of the items that are trained on, the same in every process; all if there are fewer."""
        return self._pieces(self.trained[:items])

    def _pieces(self, chosen: list[int]) -> Iterator[Batch]:
        for start in range(0, len(chosen), self.size):
            yield self._items(chosen[start : start + self.size])

    def _place(self, place: int) -> int:
        epoch, index = divmod(place, len(self.trained))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(self.trained, epoch)
        return self._order[index]

    def _shuffled(self, items: range | list[int], epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + epoch + 1)
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    def _items(self, chosen: list[int]) -> Batch:
        arrays, labels = self.data.take(chosen)
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        known = labels is not None and self.labels
        return inputs, torch.from_numpy(labels).long() if known else None
