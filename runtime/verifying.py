"""Two questions kept apart: is it the same function, and is the quality kept?

Token reduction must change numbers and should keep quality; lowering must change neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from thresher.compiler.errors import UsageError
from thresher.compiler.handed import CORE
from thresher.runtime.batches import run_in_batches
from thresher.runtime.deviation import EPS, TIES, Deviations, OutputError, plain, tolerance
from thresher.runtime.feeds import Array, describe
from thresher.runtime.generate import with_own_past
from thresher.runtime.perplexity import PerplexityKept, Windows, compare_perplexity
from thresher.runtime.quality import Counts, QualityKept, quality_kept
from thresher.runtime.rounding import twins
from thresher.runtime.runner import Runnable
from thresher.runtime.sample import random_inputs
from thresher.runtime.scoring import Dataset

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
    alike = a.changed_by == b.changed_by
    if same is None:
        same = max_drop is None and alike
    precision = max((a.precision, b.precision), key=EPS.__getitem__)
    allowed, discrete = tolerance(precision), a.reduced and b.reduced
    deviations = Deviations(allowed, discrete=discrete)
    counts = Counts(output)
    what, batches = _batches(a, dataset, inputs, batch, limit, sizes, seed)
    for feeds, labels in batches:
        left, right = (run_in_batches(model, feeds) for model in (a, b))
        ask = discrete and not allowed.answers and (same or alike)
        deviations.add(left, right, twins(a, feeds, allowed) if ask else ())
        if labels is not None:
            counts.add(left, right, labels)
    first = _same_function(deviations, what)
    second: QualityKept | PerplexityKept | None
    quality, perplexity = None, None
    if text is not None:
        second = perplexity = compare_perplexity(a, b, text, max_drop=max_drop)
    else:
        second = quality = quality_kept(counts, dataset, max_drop)
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


def _same_function(deviations: Deviations, what: str) -> SameFunction:
    outputs = deviations.results()
    limit = deviations.limit
    same = bool(outputs) and all(error.same for error in outputs)
    return SameFunction(same, outputs, what, limit.relative, limit.reason, limit.share)


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
    said = _undecided(first)
    if first.same and odd:
        samples = first.outputs[0].samples
        said += f"; {odd} of {samples} samples differ as by a tie between two tokens"
    return said


def _undecided(first: SameFunction) -> str:
    """Said of samples that were left out."""
    worst = max(first.outputs, key=lambda error: error.undecided, default=None)
    if worst is None or not worst.undecided:
        return ""
    return (
        f"; {worst.undecided} of {worst.samples + worst.undecided} samples decide nothing: rounding"
        " changes the tokens that the program itself chooses there"
    )
