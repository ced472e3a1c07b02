"""What skipping is worth: measured factors of the kernels, put together by Amdahl's law.

``k`` is how many times as fast as a dense linear the sparse one is, at a share s of inputs that one
token does not need.  For one token both read their weights from memory, and time is counted in bytes:

    k = (bytes + DENSE_CALL) / ((1 - s) bytes READ (1 + AHEAD / row) + CALL)

as a row is fetched a little beyond its end, into what is skipped, and every call has its price.  It was
fitted to an Intel Xeon (AVX-512), fp32, from 576 x 576 to 4096 x 11008, and is within 15 % of what was
measured there at s = 0.5 and 0.7; an AMD EPYC gains as much or up to a quarter more (docs/benchmarks.md).  For 2 to 8
tokens factors are those of 768 x 3072 on the EPYC, weights from memory, the lower of one thread and two.  From
16 tokens on a product is bound by arithmetic, and the operator runs dense.  Those for weights in bfloat16
and one token are of 4096 x 11008 on the Xeon, rounded down; for more tokens they count as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Points = tuple[tuple[float, float], ...]
READ, AHEAD = 0.92, 256  # of the time in which the dense product reads a byte; bytes
CALL, DENSE_CALL = 192e3, 100e3  # bytes that are read in the time of a call besides
CPU: dict[int, Points] = {
    2: ((0.0, 1.10), (0.3, 1.19), (0.5, 1.39), (0.7, 1.90), (0.9, 4.0), (0.95, 5.7)),
    4: ((0.0, 1.02), (0.3, 1.00), (0.5, 1.04), (0.7, 1.29), (0.9, 2.3), (0.95, 3.2)),
    8: ((0.0, 0.91), (0.3, 0.89), (0.5, 0.90), (0.7, 0.94), (0.9, 1.5), (0.95, 2.3)),
}
CPU_BF16 = CPU | {1: ((0.0, 1.9), (0.3, 2.6), (0.5, 3.5), (0.7, 4.8), (0.9, 13.0))}
KERNELS: dict[str, dict[int, Points]] = {"cpu": CPU}
NARROW: dict[str, dict[int, Points]] = {"cpu": CPU_BF16}  # weights in bfloat16
OTHERS = "all other targets"  # which have no kernel
WITHOUT = 0.95  # a mask and a dense product: 4 to 18 % slower than the dense product, measured
LEAST_GAIN = 1.02  # less than this is not worth a changed model


@dataclass(frozen=True)
class Part:
    """Linears that read one tensor.

    Attributes:
        share: of the work of the whole model.
        active: share of the inputs that M tokens at once need, by M.
        inputs, outputs: size of the matrix that all of them make side by side.
    """

    share: float
    active: Mapping[int, float]
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Verdict:
    """Whether skipping pays on a target for so many tokens at once, with the arithmetic."""

    target: str
    tokens: int
    gain: float
    sentence: str

    @property
    def pays(self) -> bool:
        return self.gain >= LEAST_GAIN


def factor(
    target: str,
    tokens: int,
    active: float,
    inputs: int,
    outputs: int,
    weights: str = "float32",
) -> float:
    """k of one linear, where ``tokens`` tokens at once need the share ``active`` of its inputs.

    The tables hold shares of one token.  Masks of neighbouring tokens overlap more than by
    chance, so the measured union is turned into the share s that would give it by chance:
    ``1 - s^M = active``.
    """
    tables = (NARROW if weights == "bfloat16" else KERNELS).get(target)
    if tables is None:
        return WITHOUT
    if tokens > max(tables):
        return 1.0
    if tokens == 1 and weights == "float32":
        return _step(active, inputs, outputs)
    size = min(m for m in tables if m >= tokens)
    s = max(0.0, 1 - active) ** (1 / tokens)
    xs, ys = zip(*tables[size], strict=True)
    return float(np.exp(np.interp(s, xs, np.log(ys))))


def _step(active: float, inputs: int, outputs: int) -> float:
    """k of one token and float32 weights; see above."""
    row = 4.0 * outputs
    stored = inputs * row
    return (stored + DENSE_CALL) / (active * stored * READ * (1 + AHEAD / row) + CALL)


def at(unions: Mapping[int, float], tokens: int) -> float:
    """Active share for so many tokens: measured, or that of the next smaller M that was (a lower bound)."""
    smaller = [m for m in unions if m <= tokens]
    return unions[max(smaller)] if smaller else 1.0


def verdict(
    target: str,
    tokens: int,
    parts: Mapping[str, Part],
    weights: str = "float32",
) -> Verdict:
    """The gain of a whole model.

    Args:
        target: name of a back end.
        tokens: that pass through the linears together.
        parts: linears that skip, by the name of what they read.
        weights: the type in which they are kept.
    """
    rest, spent, active = 1.0, 0.0, 0.0
    whole = sum(part.share for part in parts.values())
    for part in parts.values():
        needed = at(part.active, tokens)
        spent += part.share / factor(target, tokens, needed, part.inputs, part.outputs, weights)
        active += part.share * needed
    gain = 1 / (rest - whole + spent)
    active = active / whole if whole else 1.0
    k = whole / spent if spent else 1.0
    pays = "pays" if gain >= LEAST_GAIN else "does not pay"
    how = "" if target in KERNELS else " (no kernel there: a mask and a dense product)"
    many = "1 token" if tokens == 1 else f"{tokens} tokens"
    return Verdict(
        target,
        tokens,
        gain,
        f"{target}, {many} at once: {pays}: {active:.0%} of the neurons are needed, k = {k:.2f}{how}"
        f" on {whole:.0%} of the work is {gain:.2f}x",
    )
