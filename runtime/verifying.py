"""Two questions kept apart: is it the same function, and is the quality kept?

Token reduction must change numbers and should keep quality; lowering must change neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import UsageError
from thresher.compiler.handed import CORE
from thresher.runtime.batches import run_in_batches
from thresher.runtime.deviation import EPS, TIES, Deviations, OutputError, plain, tolerance
from thresher.runtime.feeds import Array, describe
from thresher.runtime.generate import with_own_past
from thresher.runtime.perplexity import PerplexityKept, Windows, compare_perplexity
from thresher.runtime.runner import Runnable
from thresher.runtime.sample import random_inputs
from thresher.runtime.scoring import Dataset, predicted

SCHEMA = "thresher.verify/1"
ROUNDS = 4  # random batches compared


@dataclass(frozen=True)
class SameFunction:
    """First verdict: every output of every input agrees within the tolerance."""

    same: bool
    outputs: tuple[OutputError, ...]
    inputs: str
    tolerance: float
    reason: str
    share: float  # of the samples, that has to agree


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


@dataclass(frozen=True)
class Verification:
    """Both verdicts; ``met`` is whether everything that was demanded holds.

    The second one is ``perplexity`` for causal language models and ``quality`` for all others.
    """

    a: str
    b: str
    same_function: SameFunction
    quality: QualityKept | None
    demanded: tuple[str, ...]
    met: bool
    sentences: tuple[str, ...]
    perplexity: PerplexityKept | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data under a versioned schema."""
        return {"schema": SCHEMA, **plain(asdict(self))}


def verify(
    a: Runnable,
    b: Runnable,
    *,
    dataset: Dataset | None = None,
    inputs: Sequence[Mapping[str, Array]] | None = None,
    batch: int = 8,
    limit: int | None = None,
    max_drop: float | None = None,
    same: bool | None = None,
    output: str | None = None,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    text: Windows | None = None,
) -> Verification:
    """Compare ``b`` with the reference ``a``.

    Args:
        a: the reference.
        b: the candidate, with the same inputs and outputs.
        dataset: labelled data for the second verdict; its batches serve the first one too.
        inputs: batches to compare on; by default seeded random ones, or the data set's.
        batch: samples in a batch.
        limit: number of samples of the data set to use.
        max_drop: points of accuracy that may be lost, or percent that perplexity may rise; demands
            the second verdict.
        same: whether the first verdict is demanded; by default when nothing else is and the same
            passes with the same options changed what the two compute.
        output: name of the logits; by default the first output ``[samples, classes]``.
        sizes: sizes of symbolic axes other than the batch, for random inputs.
        seed: of the random inputs.
        text: for the second verdict on causal language models, in place of a data set.

    Raises:
        UsageError: the two cannot be compared, or a drop is demanded without labelled data.
        VerdictError: an output has another shape.
    """
    comparable(a, b)
    if max_drop is not None and dataset is None and text is None:
        raise UsageError("a largest drop needs labelled data: give --data, or leave --max-drop out")
    if same is None:
        same = max_drop is None and a.changed_by == b.changed_by
    precision = max((a.precision, b.precision), key=EPS.__getitem__)
    deviations = Deviations(tolerance(precision), discrete=a.reduced and b.reduced)
    counts = _Counts(output)
    what, batches = _batches(a, dataset, inputs, batch, limit, sizes, seed)
    for feeds, labels in batches:
        left, right = (run_in_batches(model, feeds) for model in (a, b))
        deviations.add(left, right)
        if labels is not None:
            counts.add(left, right, labels)
    first = _same_function(deviations, what)
    second: QualityKept | PerplexityKept | None
    quality, perplexity = None, None
    if text is not None:
        second = perplexity = compare_perplexity(a, b, text, max_drop=max_drop)
    else:
        second = quality = _quality(counts, dataset, max_drop)
    demanded = tuple(n for n, on in (("same", same), ("quality", max_drop is not None)) if on)
    met = (first.same or not same) and (second is None or second.kept is not False)
    sentences = (*_sentences(a.name, b.name, first, second), *_left_early(a, b))
    return Verification(a.name, b.name, first, quality, demanded, met, sentences, perplexity)


def _left_early(*models: Runnable) -> Iterator[str]:
    """Of engines with an exit, how many items left by it."""
    for model in models:
        left = getattr(model, "left_early", None)
        if left is not None:
            yield f"{model.name}: {left}"


Labelled = tuple[Mapping[str, Array], Array | None]


def _batches(
    a: Runnable,
    dataset: Dataset | None,
    inputs: Sequence[Mapping[str, Array]] | None,
    batch: int,
    limit: int | None,
    sizes: Mapping[str, int] | None,
    seed: int,
) -> tuple[str, Iterable[Labelled]]:
    if inputs is not None:
        return "given", [(feeds, None) for feeds in inputs]
    if dataset is not None:
        return f"data set {dataset.name}", dataset.batches(batch, limit)
    drawn = (
        random_inputs(a.inputs, batch=batch, sizes=sizes, ranges=a.ranges, seed=seed + i)
        for i in range(ROUNDS)
    )
    made: list[Labelled] = [(with_own_past(a, feeds), None) for feeds in drawn]
    return f"random, standard normal, seeds {seed} to {seed + ROUNDS - 1}", made


def comparable(a: Runnable, b: Runnable) -> None:
    """Raise UsageError unless both have the same input and output names."""
    for kind, left, right in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        names = {spec.name for spec in left}
        for spec in right:
            if spec.name not in names:
                raise UsageError(
                    f"{b.name} has the {kind} {spec.name!r} {describe(spec)} and {a.name} has not:"
                    " compare two forms of one model"
                )
        missing = sorted(names - {spec.name for spec in right})
        if missing:
            raise UsageError(
                f"{b.name} lacks the {kind} {missing[0]!r} of {a.name}:"
                " compare two forms of one model"
            )


class _Counts:
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


def _same_function(deviations: Deviations, what: str) -> SameFunction:
    outputs = deviations.results()
    limit = deviations.limit
    same = bool(outputs) and all(error.same for error in outputs)
    return SameFunction(same, outputs, what, limit.relative, limit.reason, limit.share)


def _quality(
    counts: _Counts, dataset: Dataset | None, max_drop: float | None
) -> QualityKept | None:
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


def _sentences(
    a: str, b: str, first: SameFunction, second: QualityKept | PerplexityKept | None
) -> tuple[str, ...]:
    worst = max(first.outputs, key=lambda error: error.relative, default=None)
    if worst is None and second is not None:
        return (second.sentence(a, b),)
    far = f"{worst.relative:.2g}" if worst else "nothing was compared,"
    said = [
        f"same function: {'yes' if first.same else 'no'}; the largest difference is {far} of the"
        f" output's scale and {first.tolerance:.2g} is rounding ({first.reason}){_ties(first)}"
    ]
    if second is not None:
        said.append(second.sentence(a, b))
    return tuple(said)


def _ties(first: SameFunction) -> str:
    """Said when the answer is yes although some samples differ by more than rounding."""
    core = [error for error in first.outputs if error.name.startswith(CORE)]
    others = max((error.samples - error.agreeing for error in core), default=0)
    if others:
        return (
            f"; {others} of {core[0].samples} core neurons of a network are others, {TIES:.0%} may"
        )
    odd = max((error.samples - error.agreeing for error in first.outputs), default=0)
    if first.share < 1:
        return f"; {odd} of {first.outputs[0].samples} samples disagree, {1 - first.share:.0%} may"
    if not first.same or not odd:
        return ""
    return f"; {odd} of {first.outputs[0].samples} samples differ as by a tie between two tokens"


def _answer(quality: QualityKept) -> str:
    if quality.kept is None:
        return "not demanded"
    near = abs(quality.difference + (quality.max_drop or 0)) < 2 * quality.standard_error
    doubt = ", though within two standard errors of the limit" if near else ""
    return f"{'yes' if quality.kept else 'no'}, {quality.max_drop:g} points may be lost{doubt}"
