"""What skipping is worth: measured factors of the kernels, put together by Amdahl's law.

``k`` is how many times as fast as a dense linear the sparse one is, at a share s of inputs that one
token does not need.  The factors of ``cpu`` were measured on an AMD Zen 4 core (AVX-512), one
thread, fp32, 768 x 3072, weights streamed from memory and not from the cache; for 2 to 8 tokens
against the dense product of ONNX Runtime, weights cached.  From 16 tokens on a product is bound
by arithmetic, and the operator runs dense.  Those for weights in bfloat16 and one token are of
4096 x 11008 on an Intel Xeon, rounded down (docs/benchmarks.md); for more tokens they count as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Points = tuple[tuple[float, float], ...]
CPU: dict[int, Points] = {
    1: ((0.15, 1.0), (0.3, 1.15), (0.5, 1.55), (0.7, 2.5), (0.9, 7.2), (0.95, 15.0)),
    2: ((0.5, 0.72), (0.7, 1.14), (0.9, 3.2), (0.95, 6.1)),
    4: ((0.5, 0.84), (0.7, 0.98), (0.9, 2.4), (0.95, 4.5)),
    8: ((0.5, 0.90), (0.7, 0.97), (0.9, 1.6), (0.95, 2.8)),
}
CPU_BF16 = CPU | {1: ((0.0, 1.9), (0.3, 2.6), (0.5, 3.5), (0.7, 4.8), (0.9, 13.0))}
KERNELS: dict[str, dict[int, Points]] = {"cpu": CPU}
NARROW: dict[str, dict[int, Points]] = {"cpu": CPU_BF16}  # weights in bfloat16
OTHERS = "all other targets"  # which have no kernel
WITHOUT = 0.95  # a mask and a dense product: 4 to 18 % slower than the dense product, measured
LEAST_GAIN = 1.02  # less than this is not worth a changed model


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


def factor(target: str, tokens: int, active: float, weights: str = "float32") -> float:
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
    size = min(m for m in tables if m >= tokens)
    s = max(0.0, 1 - active) ** (1 / tokens)
    xs, ys = zip(*tables[size], strict=True)
    return float(np.exp(np.interp(s, xs, np.log(ys))))


def amdahl(share: float, k: float) -> float:
    """``1 / (1 - f + f / k)``: the gain of the whole, a share f of it k times as fast."""
    return 1 / (1 - share + share / k)


def at(unions: Mapping[int, float], tokens: int) -> float:
    """Active share for so many tokens: measured, or that of the next smaller M that was (a lower bound)."""
    smaller = [m for m in unions if m <= tokens]
    return unions[max(smaller)] if smaller else 1.0


def verdict(
    target: str,
    tokens: int,
    layers: Mapping[str, tuple[float, Mapping[int, float]]],
    weights: str = "float32",
) -> Verdict:
    """The gain of a whole model.

    Args:
        target: name of a back end.
        tokens: that pass through the layers together.
        layers: share of the work and active share by M, for each layer.
        weights: the type in which they are kept.
    """
    rest, spent, active = 1.0, 0.0, 0.0
    whole = sum(share for share, _ in layers.values())
    for share, unions in layers.values():
        spent += share / factor(target, tokens, at(unions, tokens), weights)
        active += share * at(unions, tokens)
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
