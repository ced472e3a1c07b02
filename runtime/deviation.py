"""Error statistics of one output against a reference, gathered batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import VerdictError
from thresher.compiler.handed import CORE
from thresher.runtime.core_neurons import pairs

Array = NDArray[Any]

EPS = {  # coarsest first
    "int8": 1 / 127,
    "bf16": 2.0**-7,
    "fp16": 2.0**-10,
    "fp32": 2.0**-23,
    "fp64": 2.0**-52,
}
DEPTH = 16  # roundings that pile up on the longest path, as a random walk
WIDTH = 32  # root of the ~1000 terms of a sum that is accumulated in the type itself
ANSWERS = 0.9  # share of samples that must agree where what counts are answers
TIES = 0.25  # share of samples that may take another token (or neuron) where two score equal up to rounding
TIED = 0.05  # of the scale: the most that another choice of a token may change an output
FAR = 4.0  # how much farther from a reference than its twins what is undecided may be
DECIDED = 1 / 3  # of all samples have to agree where some are undecided: two of a batch of 4


@dataclass(frozen=True)
class Tolerance:
    """Allowed absolute error, as a share of the reference's largest magnitude.

    ``answers``: whether a sample whose likeliest class is the same agrees whatever the error; then
    ``share`` of the samples have to agree, and no error may be larger than ``most``.
    """

    relative: float
    reason: str
    answers: bool = False
    share: float = 1.0
    most: float = math.inf


@dataclass(frozen=True)
class OutputError:
    """How far an output is from the reference.

    ``relative`` is ``max_abs / max |reference|``; ``sqnr_db`` is the signal to noise ratio
    ``10 log10(sum a^2 / sum (b - a)^2)``, None for no error at all; ``cosine`` is the mean over
    samples; ``top1`` is the share of equal argmax, for outputs ``[samples, classes]``;
    ``agreeing`` of ``samples`` were within the tolerance.  Those ``undecided`` are no part of any other
    number.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    samples: int
    agreeing: int
    undecided: int
    max_abs: float
    mean_abs: float
    relative: float
    sqnr_db: float | None
    cosine: float
    top1: float | None
    same: bool

    @property
    def decided(self) -> bool:
        """Whether enough of all samples agree for the undecided ones to be left out."""
        everything = self.samples + self.undecided
        return not self.undecided or self.agreeing >= DECIDED * everything


def tolerance(precision: str) -> Tolerance:
    """Tolerance of a computation in ``precision``, with the reason in words.

    Half precision sums are accumulated in float32, so only the depth counts there.
    """
    eps = EPS[precision]
    if precision == "int8":  # the steps of a tensor are equal: small values lose all their digits
        reason = f"{DEPTH} roundings of int8 (eps {eps:.2g}), or the same answer"
        return Tolerance(DEPTH * eps, reason, answers=True, share=ANSWERS, most=1.0)
    if precision in ("bf16", "fp16"):
        return Tolerance(DEPTH * eps, f"{DEPTH} roundings of {precision} (eps {eps:.2g})")
    return Tolerance(
        DEPTH * WIDTH * eps,
        f"{DEPTH} roundings deep x {WIDTH} for sums of ~1000 terms, x eps of {precision} ({eps:.2g})",
    )


class Deviations:
    """Gathers the errors of all outputs over any number of batches.

    Core neurons that are handed on are compared as sets, one "output" for each network: its
    samples are neurons, of which three quarters have to be in both, and errors are those of the shared ones.

    Args:
        limit: the tolerance to judge by.
        discrete: whether the model chooses tokens; then up to a quarter of the samples may differ
            by up to 5 % of the scale, because rounding decides between equal scores.
    """

    def __init__(self, limit: Tolerance, *, discrete: bool = False) -> None:
        self.limit = limit
        self.discrete = discrete
        self._sums: dict[str, _Sums] = {}

    def add(
        self,
        reference: Mapping[str, Array],
        other: Mapping[str, Array],
        twins: Iterable[Mapping[str, Array]] = (),
    ) -> None:
        """Compare one batch of outputs.

        Args:
            reference: the right outputs.
            other: the outputs to judge.
            twins: the reference with other roundings, run as far as it takes to tell which samples
                are undecided: the other one differs, and the reference differs from itself as well.

        Raises:
            VerdictError: an output is missing or has another shape.
        """
        for name, expected in reference.items():
            found = other.get(name)
            if found is None or found.shape != expected.shape:
                shape = "missing" if found is None else f"of shape {list(found.shape)}"
                raise VerdictError(
                    f"the output {name!r} is {shape} and should be {list(expected.shape)}"
                )
        outputs = {name: value for name, value in reference.items() if not name.startswith(CORE)}
        left_out = _undecided(outputs, other, iter(twins), self.limit)
        for name, expected in outputs.items():
            self._of(name, expected).add(expected, other[name], self.limit, left_out[name])
        for name, (ours, theirs) in pairs(reference, other).items():
            self._of(name, ours).add_shared(ours, theirs, self.limit)

    def _of(self, name: str, values: Array) -> _Sums:
        return self._sums.setdefault(name, _Sums(name, values.dtype.name))

    def results(self) -> tuple[OutputError, ...]:
        share, most = self.limit.share, self.limit.most
        if self.discrete and not self.limit.answers:
            share, most = 1 - TIES, max(TIED, self.limit.relative)
        least = {name: min(share, 1 - TIES) for name in self._sums if name.startswith(CORE)}
        return tuple(sums.result(least.get(name, share), most) for name, sums in self._sums.items())


def _undecided(
    reference: Mapping[str, Array],
    other: Mapping[str, Array],
    twins: Iterator[Mapping[str, Array]],
    limit: Tolerance,
) -> dict[str, NDArray[np.bool_]]:
    """By output, ``[samples]``: see :meth:`Deviations.add`."""
    allowed = {name: limit.relative * _peak(values) for name, values in reference.items()}
    error = {name: _furthest(values, other[name]) for name, values in reference.items()}
    odd = {name: (worst > allowed[name]) & np.isfinite(worst) for name, worst in error.items()}
    found = {name: np.zeros_like(differs) for name, differs in odd.items()}
    while any(differs.any() for differs in odd.values()):
        twin = next(twins, None)
        if twin is None:
            break
        for name, values in reference.items():
            apart = _furthest(values, twin[name])
            found[name] |= odd[name] & (apart > allowed[name]) & (error[name] <= FAR * apart)
            odd[name] &= ~found[name]
    return found


class _Sums:
    """Running sums of one output."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype = name, dtype
        self.shape: tuple[int, ...] = ()
        self.count = self.samples = self.agreeing = self.undecided = self.equal_argmax = 0
        self.max_abs = self.sum_abs = self.noise = self.signal = self.peak = self.cosines = 0.0
        self.classes = False

    def add(
        self, expected: Array, found: Array, limit: Tolerance, out: NDArray[np.bool_] | None = None
    ) -> None:
        """Rows that are ``out`` are counted and not compared."""
        a, b, peak = _rows(expected), _rows(found), _peak(expected)
        if out is not None:
            self.undecided += int(out.sum())
            a, b = a[~out], b[~out]
        error = _errors(a, b)
        a, b = (np.nan_to_num(x, posinf=0.0, neginf=0.0) for x in (a, b))
        worst = error.max(axis=1, initial=0.0)
        self.shape = tuple(expected.shape)
        self.samples += len(a)
        self.count += a.size
        self.max_abs = max(self.max_abs, float(worst.max(initial=0.0)))
        self.peak = max(self.peak, peak)
        self.sum_abs += float(error.sum())
        self.noise += float((error * error).sum())
        self.signal += float((a * a).sum())
        self.cosines += float(cosines(a, b).sum())
        self.classes = expected.ndim == 2 and expected.shape[1] > 1 and expected.dtype.kind == "f"
        agreeing = worst <= limit.relative * peak
        if self.classes:
            equal = a.argmax(1) == b.argmax(1)
            self.equal_argmax += int(equal.sum())
            agreeing |= equal & limit.answers
        self.agreeing += int(agreeing.sum())

    def add_shared(self, expected: Array, found: Array, limit: Tolerance) -> None:
        """Rows ``[n, C]`` that are none of the other's are samples that disagree, without an error."""
        worst = np.abs(found - expected).max(axis=1)
        shared = worst <= limit.relative * np.abs(expected).max(initial=0.0)
        self.add(expected[shared, None], found[shared, None], limit)  # three axes: no classes
        self.samples += int((~shared).sum())

    def result(self, share: float, most: float) -> OutputError:
        relative = self.max_abs / (self.peak or 1.0)
        found = OutputError(
            name=self.name,
            dtype=self.dtype,
            shape=self.shape,
            samples=self.samples,
            agreeing=self.agreeing,
            undecided=self.undecided,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / max(1, self.count),
            relative=relative,
            sqnr_db=_decibels(self.signal, self.noise),
            cosine=self.cosines / max(1, self.samples),
            top1=self.equal_argmax / max(1, self.samples) if self.classes else None,
            same=self.agreeing >= share * self.samples and relative <= most,
        )
        return replace(found, same=found.same and found.decided)


def _rows(values: Array) -> NDArray[np.float64]:
    """``[samples, numbers]``."""
    count = values.shape[0] if values.ndim else 1
    return values.reshape(count, math.prod(values.shape[1:])).astype(np.float64)


def _peak(values: Array) -> float:
    """Largest finite magnitude: the scale of an output."""
    return float(np.abs(np.nan_to_num(_rows(values), posinf=0.0, neginf=0.0)).max(initial=0.0))


def _furthest(expected: Array, found: Array) -> NDArray[np.float64]:
    """``[samples]``: the largest error of each."""
    furthest: NDArray[np.float64] = _errors(_rows(expected), _rows(found)).max(axis=1, initial=0.0)
    return furthest


def _errors(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Absolute differences; equal infinities and paired NaN count as equal, others as infinite."""
    finite = np.isfinite(a) & np.isfinite(b)
    error = np.zeros_like(a)
    np.subtract(b, a, where=finite, out=error)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    error[~finite & ~equal] = np.inf
    return np.abs(error)


def cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row-wise cosine; 1 where both rows are zero."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = (a * b).sum(axis=1)
    safe = np.where(norms == 0, 1.0, norms)
    both_zero = (np.abs(a).sum(axis=1) == 0) & (np.abs(b).sum(axis=1) == 0)
    result: NDArray[np.float64] = np.where(both_zero, 1.0, dots / safe)
    return result


def _decibels(signal: float, noise: float) -> float | None:
    if noise == 0:
        return None
    if not math.isfinite(noise) or signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)


def plain(value: Any) -> Any:
    """Ready for JSON, which has no infinity: such numbers become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
