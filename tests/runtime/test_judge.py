"""Scores of each item, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from thresher.compiler.errors import UsageError
from thresher.runtime.judge import Judge
from thresher.runtime.manifest import TensorInfo
from thresher.runtime.scoring import likeness

Array = NDArray[Any]
RNG = np.random.default_rng(0)
ITEMS, CLASSES = 11, 3
LABELS = RNG.integers(0, CLASSES, ITEMS)
DENSE, OTHER = RNG.normal(size=(2, ITEMS, CLASSES)).astype(np.float32)


@dataclass
class Answers:
    """A model that answers item i with row i of a table."""

    table: Array
    name: str = "answers"
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    precision: str = "fp32"
    reduced: bool = False
    changed_by: tuple[str, ...] = ()
    runs: int = 0

    @property
    def ranges(self) -> dict[str, tuple[int, int | None]]:
        return {}

    def run(self, inputs: Mapping[str, Array], /) -> dict[str, Array]:
        self.runs += 1
        return {"y": self.table[inputs["i"]]}


@dataclass
class Numbers:
    """Items that are their own number."""

    labels: Array | None
    name: str = "numbers"

    def batches(
        self, size: int, limit: int | None = None
    ) -> Iterator[tuple[dict[str, Array], Array | None]]:
        for start in range(0, ITEMS, size):
            items = np.arange(start, min(ITEMS, start + size))
            yield {"i": items}, None if self.labels is None else self.labels[items]


def test_accuracy_where_there_are_labels() -> None:
    judge = Judge(Answers(DENSE), Numbers(LABELS), classes=True, batch=4)
    assert judge.measure == "accuracy"
    for found, table in ((judge.dense, DENSE), (judge(Answers(OTHER)), OTHER)):
        assert list(found) == [
            float(max(range(CLASSES), key=lambda c: table[i, c]) == LABELS[i]) for i in range(ITEMS)
        ]


@pytest.mark.parametrize("labels", [None, LABELS.astype(np.float64)])  # ratings are no classes
def test_agreement_where_there_are_none(labels: Array | None) -> None:
    judge = Judge(Answers(DENSE), Numbers(labels), classes=True, batch=4)
    assert judge.measure == "agreement"
    assert list(judge.dense) == [1.0] * ITEMS
    expected = [float(DENSE[i].argmax() == OTHER[i].argmax()) for i in range(ITEMS)]
    assert list(judge(Answers(OTHER))) == expected


def test_cosine_where_the_model_answers_with_no_classes() -> None:
    judge = Judge(Answers(DENSE), Numbers(LABELS), classes=False, batch=4)
    assert judge.measure == "cosine"
    assert list(judge.dense) == [1.0] * ITEMS
    expected = [
        sum(float(a) * float(b) for a, b in zip(DENSE[i], OTHER[i], strict=True))
        / math.sqrt(sum(float(a) ** 2 for a in DENSE[i]) * sum(float(b) ** 2 for b in OTHER[i]))
        for i in range(ITEMS)
    ]
    assert judge(Answers(OTHER)) == pytest.approx(expected)
    assert judge(Answers(DENSE)) == pytest.approx(1.0)


def test_zero_rows_have_a_cosine() -> None:
    zero, one = np.zeros((1, 2)), np.ones((1, 2))
    assert [*likeness(zero, zero), *likeness(zero, one)] == [1.0, 0.0]


def test_the_dense_model_runs_once() -> None:
    dense = Answers(DENSE)
    judge = Judge(dense, Numbers(LABELS), classes=True, batch=4)
    judge(Answers(OTHER))
    judge(Answers(OTHER))
    assert dense.runs == 3


def test_answers_without_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="no logits among the outputs y"):
        Judge(Answers(DENSE[..., None]), Numbers(LABELS), classes=True)
