"""Quality as one score for each item, so that two models are compared in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from thresher.runtime.batches import run_in_batches
from thresher.runtime.feeds import Array
from thresher.runtime.runner import Runnable
from thresher.runtime.scoring import Dataset, likeness, predicted

Scores = NDArray[np.float64]
Outputs = Mapping[str, Array]
Step = Callable[[], object]
MEASURES = {
    "accuracy": "share of right answers",
    "agreement": "share of answers that are the dense model's",
    "cosine": "mean cosine to the dense model's outputs",
}


class Judge:
    """Scores candidates against a dense model that was run once.

    ``accuracy`` where there are labels and the model answers with classes, ``agreement`` with the
    dense model's classes without labels, the ``cosine`` to its outputs where there are no classes.

    Args:
        dense: the reference.
        dataset: the items.
        classes: whether the model answers with classes.
        batch: items in a batch.
        step: called after each batch of any model.
    """

    def __init__(
        self,
        dense: Runnable,
        dataset: Dataset,
        *,
        classes: bool,
        batch: int = 8,
        step: Step = lambda: None,
    ) -> None:
        self.dataset, self.batch, self.step = dataset, batch, step
        self._labels: list[Array | None] = []
        self._expected: list[Outputs | Array] = []
        for outputs, labels in self._run(dense):
            usable = labels is not None and labels.dtype.kind in "iu"
            self._labels.append(labels if usable else None)
            self._expected.append(predicted(outputs) if classes else outputs)
        labelled = all(labels is not None for labels in self._labels)
        self.measure = ("accuracy" if labelled else "agreement") if classes else "cosine"
        self.dense: Scores = np.concatenate(
            [
                np.asarray(expected == labels, dtype=np.float64)
                if self.measure == "accuracy"
                else np.ones(_items(expected))
                for expected, labels in zip(self._expected, self._labels, strict=True)
            ]
        )

    def __call__(self, candidate: Runnable) -> Scores:
        """The scores ``[n]`` of a candidate in [0, 1]; those of the dense model are ``dense``."""
        return np.concatenate(
            [self._score(i, outputs) for i, (outputs, _) in enumerate(self._run(candidate))]
        )

    def _run(self, model: Runnable) -> Iterator[tuple[Outputs, Array | None]]:
        for feeds, labels in self.dataset.batches(self.batch):
            yield run_in_batches(model, feeds), labels
            self.step()

    def _score(self, index: int, outputs: Outputs) -> Scores:
        """Scores ``[items]`` of one batch."""
        expected, labels = self._expected[index], self._labels[index]
        if isinstance(expected, Mapping):
            found = [likeness(expected[name], outputs[name]) for name in expected]
            return np.asarray(np.mean(found, axis=0), dtype=np.float64)
        right = labels if self.measure == "accuracy" else expected
        return np.asarray(predicted(outputs) == right, dtype=np.float64)


def _items(expected: Outputs | Array) -> int:
    return len(next(iter(expected.values())) if isinstance(expected, Mapping) else expected)
