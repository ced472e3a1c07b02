"""Is the quality kept?  Answers of two models to the same labelled samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import UsageError
from thresher.runtime.feeds import Array
from thresher.runtime.scoring import Dataset, predicted


@dataclass(frozen=True)
class QualityKept:
    """Second verdict, on labelled data.

    Accuracies are shares of ``n``; ``difference`` is b - a in points (hundredths) and
    ``standard_error`` its paired standard error (McNemar): with f = right_to_wrong +
    wrong_to_right, ``sqrt(f - (wrong_to_right - right_to_wrong)^2 / n) / n``.  ``kept`` is None
    when no drop was demanded.
    """

    dataset: str
    n: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    standard_error: float
    right_to_wrong: int
    wrong_to_right: int
    agreement: float
    max_drop: float | None
    kept: bool | None

    def sentence(self, a: str, b: str) -> str:
        """The verdict in words."""
        return (
            f"quality kept: {_answer(self)}; {b} is right on {self.accuracy_b:.2%} and {a} on"
            f" {self.accuracy_a:.2%} of {self.n} samples: {self.difference:+.2f} points (standard"
            f" error {self.standard_error:.2f}), {self.right_to_wrong} right became wrong and"
            f" {self.wrong_to_right} wrong became right"
        )


class Counts:
    """Right and wrong answers of both on the same samples."""

    def __init__(self, output: str | None) -> None:
        self.output = output
        self.n = self.right_a = self.right_b = self.lost = self.won = self.equal = 0

    def add(self, a: Mapping[str, Array], b: Mapping[str, Array], labels: Array) -> None:
        pick_a, pick_b = predicted(a, self.output), predicted(b, self.output)
        good_a: NDArray[np.bool_] = pick_a == labels
        good_b: NDArray[np.bool_] = pick_b == labels
        self.n += len(labels)
        self.right_a += int(good_a.sum())
        self.right_b += int(good_b.sum())
        self.lost += int((good_a & ~good_b).sum())
        self.won += int((~good_a & good_b).sum())
        self.equal += int((pick_a == pick_b).sum())


def quality_kept(
    counts: Counts, dataset: Dataset | None, max_drop: float | None
) -> QualityKept | None:
    """The verdict, or None without labels.

    Raises:
        UsageError: a largest drop is demanded and there are no labels.
    """
    if dataset is None or counts.n == 0:
        if max_drop is not None:
            raise UsageError("a largest drop needs labels and the data set has none: give others")
        return None
    n = counts.n
    difference = 100 * (counts.right_b - counts.right_a) / n
    return QualityKept(
        dataset=dataset.name,
        n=n,
        accuracy_a=counts.right_a / n,
        accuracy_b=counts.right_b / n,
        difference=difference,
        standard_error=100 * paired_error(counts.lost, counts.won, n),
        right_to_wrong=counts.lost,
        wrong_to_right=counts.won,
        agreement=counts.equal / n,
        max_drop=max_drop,
        kept=None if max_drop is None else -difference <= max_drop,
    )


def paired_error(lost: int, won: int, n: int) -> float:
    """Standard error of the difference of two accuracies on the same ``n`` samples."""
    return math.sqrt(max(0.0, lost + won - (won - lost) ** 2 / n)) / n


def _answer(quality: QualityKept) -> str:
    if quality.kept is None:
        return "not demanded"
    near = abs(quality.difference + (quality.max_drop or 0)) < 2 * quality.standard_error
    doubt = ", though within two standard errors of the limit" if near else ""
    return f"{'yes' if quality.kept else 'no'}, {quality.max_drop:g} points may be lost{doubt}"
