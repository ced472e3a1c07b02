"""Accuracy and agreement against plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.runtime.toys import Fake
from thresher.compiler.errors import UsageError
from thresher.runtime.scoring import accuracy, agreement, predicted

INPUTS = np.random.default_rng(0).standard_normal((11, 10)).astype(np.float32)
LABELS = np.arange(11) % 10


class Data:
    """Eleven vectors."""

    name = "vectors"

    def batches(
        self, size: int, limit: int | None = None
    ) -> Iterator[tuple[dict[str, NDArray[Any]], NDArray[Any] | None]]:
        for start in range(0, limit or 11, size):
            part = slice(start, min(start + size, limit or 11))
            yield {"x": INPUTS[part]}, LABELS[part]


def bent(x: NDArray[Any]) -> NDArray[Any]:
    mixed: NDArray[Any] = x + 2 * np.roll(x, 1, axis=1)
    return mixed


def test_accuracy_looks_at_every_sample_once() -> None:
    answers = [max(range(10), key=row.__getitem__) for row in INPUTS]
    wanted = [answer == label for answer, label in zip(answers, LABELS, strict=True)]
    found = accuracy(Fake("dense"), Data(), batch=4)
    assert found.items.tolist() == wanted
    assert found.percent
    assert accuracy(Fake("dense"), Data(), batch=4, limit=5).items.tolist() == wanted[:5]


def test_agreement_is_cosine_and_equal_answers() -> None:
    cosine, top = agreement(Fake("bent", bent), Fake("dense"), Data(), batch=4)
    for row, near, equal in zip(INPUTS.astype(float), cosine.items, top.items, strict=True):
        other = bent(row[None])[0]
        assert near == pytest.approx(row @ other / np.sqrt((row @ row) * (other @ other)))
        assert equal == (row.argmax() == other.argmax())
    assert 0 < top.value < 1


def test_the_reference_agrees_with_itself_and_runs_once() -> None:
    dense = Fake("dense")
    (cosine,) = agreement(dense, dense, Data(), batch=4, classes=False)
    assert cosine.items == pytest.approx(np.ones(11))
    assert dense.runs == 3


def test_outputs_of_other_shapes_cannot_agree() -> None:
    with pytest.raises(UsageError, match="restore"):
        agreement(Fake("cut", lambda x: x[:, :5]), Fake("dense"), Data(), batch=4)


def test_logits_are_those_named_or_the_first_of_their_shape() -> None:
    outputs = {"tokens": np.zeros((2, 3, 4)), "a": np.eye(2), "b": np.eye(2)[::-1]}
    assert predicted(outputs).tolist() == [0, 1]
    assert predicted(outputs, "b").tolist() == [1, 0]
    with pytest.raises(UsageError, match="--logits"):
        predicted({"tokens": np.zeros((2, 3, 4))})
    with pytest.raises(UsageError, match="tokens, a, b"):
        predicted(outputs, "c")
