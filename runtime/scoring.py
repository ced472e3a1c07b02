"""Quality of a runnable on data: accuracy by labels, or agreement with another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from thresher.compiler.errors import UsageError
from thresher.runtime.batches import run_in_batches
from thresher.runtime.deviation import cosines
from thresher.runtime.feeds import Array
from thresher.runtime.paired import Metric
from thresher.runtime.runner import Runnable


class Dataset(Protocol):
    """What ``open_dataset`` returns."""

    @property
    def name(self) -> str: ...

    def batches(
        self, size: int, limit: int | None = None
    ) -> Iterator[tuple[dict[str, Array], Array | None]]: ...


def predicted(outputs: Mapping[str, Array], output: str | None = None) -> Array:
    """Class numbers ``[n]`` from logits ``[n, classes]``: those named, or the first of that shape.

    Raises:
        UsageError: no such output.
    """
    name = output or next((k for k, v in outputs.items() if v.ndim == 2), None)
    if name is None or name not in outputs:
        raise UsageError(
            f"there are no logits among the outputs {', '.join(outputs)}: name them with --logits"
        )
    classes: Array = outputs[name].argmax(-1)
    return classes


def accuracy(
    runnable: Runnable,
    dataset: Dataset,
    *,
    batch: int,
    limit: int | None = None,
    output: str | None = None,
) -> Metric:
    """Share of samples whose likeliest class is their label; every batch must have labels."""
    right = [
        predicted(run_in_batches(runnable, feeds), output) == labels
        for feeds, labels in dataset.batches(batch, limit)
    ]
    return Metric("accuracy", np.concatenate(right))


def agreement(
    runnable: Runnable,
    reference: Runnable,
    dataset: Dataset,
    *,
    batch: int,
    limit: int | None = None,
    output: str | None = None,
    classes: bool = True,
) -> list[Metric]:
    """Cosine to the reference's outputs and, of ``classes``, the share of equal answers.

    The cosine of a sample is the mean over the outputs, each taken as one vector.
    """
    near, equal = [], []
    for feeds, _ in dataset.batches(batch, limit):
        wanted = run_in_batches(reference, feeds)
        found = wanted if runnable is reference else run_in_batches(runnable, feeds)
        near.append(np.mean([likeness(wanted[name], found[name]) for name in wanted], axis=0))
        if classes:
            equal.append(predicted(wanted, output) == predicted(found, output))
    metrics = [Metric("cosine", np.concatenate(near))]
    return metrics + ([Metric("top-1 as dense", np.concatenate(equal))] if classes else [])


def likeness(wanted: Array, found: Array) -> Array:
    """Cosine of each sample ``[n]``, its values taken as one vector.

    Raises:
        UsageError: the outputs have other shapes, so that they cannot be compared.
    """
    if wanted.shape != found.shape:
        raise UsageError(
            f"an output has the shape {list(found.shape)} and the dense model's"
            f" {list(wanted.shape)}: agreement needs equal shapes, so leave restore at true"
        )
    rows = len(wanted)
    return cosines(
        wanted.reshape(rows, -1).astype(np.float64), found.reshape(rows, -1).astype(np.float64)
    )
