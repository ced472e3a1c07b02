"""Gates that meet a budget: one number, times the number of learners, added to all their logits.

More of it makes every token run as many learners or more, so that any budget can be met by bisection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.compiler import workers
from thresher.passes.adaptive.forward import AdaptiveForward
from thresher.passes.adaptive.learners import Learners
from thresher.passes.learning.batches import Batch, Batches

CLOSE = 0.002  # of the budget
ROUNDS = 8
BISECTIONS = 50
STEEPEST = 1e4


def shares(
    forward: AdaptiveForward, modules: Sequence[Learners], batches: Iterator[Batch]
) -> tuple[list[float], float]:
    """Mean learners that a token runs over L, by network, with the gates as at inference; and of all work."""
    logits = _logits(forward, modules, batches)
    each = [
        float(values.argmax(-1).double().mean()) / module.count
        for values, module in zip(logits, modules, strict=True)
    ]
    return each, _work(logits, modules, 0.0)


def calibrated(
    forward: AdaptiveForward, modules: Sequence[Learners], batches: Batches, budget: float
) -> float:
    """Shift the gates in place to the budget on a sample of the training data; returns the shift.

    What a gate reads changes with the gates before it, so the shift that fits what they read last is
    tried and mended until the budget is met.
    """
    total = 0.0
    for _ in range(ROUNDS):
        logits = _logits(forward, modules, batches.sample())
        if abs(_work(logits, modules, 0.0) - budget) <= CLOSE * budget:
            break
        low, high = -STEEPEST, STEEPEST
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if _work(logits, modules, middle) > budget else (middle, high)
        with torch.no_grad():
            for module in modules:
                module.gate_bias.add_(low * torch.arange(module.count + 1))
        total += low
    return total


def _work(logits: Sequence[Tensor], modules: Sequence[Learners], tilt: float) -> float:
    """Work of the learners that run over that of all, under a shift; one number for all workers."""
    run, everything = 0.0, 0
    for values, module in zip(logits, modules, strict=True):
        shifted = values + tilt * torch.arange(module.count + 1)
        run += float(shifted.argmax(-1).double().mean()) * module.macs * len(values)
        everything += module.count * module.macs * len(values)
    return float(workers.mean(torch.tensor(run / everything, dtype=torch.float64)))


def _logits(
    forward: AdaptiveForward, modules: Sequence[Learners], batches: Iterator[Batch]
) -> list[Tensor]:
    """``[T, L + 1]`` by network, of all tokens that are no padding."""
    seen: list[list[Tensor]] = [[] for _ in modules]

    def largest(site: int, logits: Tensor) -> Tensor:
        seen[site].append(logits[forward.alive(logits) > 0])
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)

    with torch.no_grad():
        for inputs, _ in batches:
            forward.adaptive(inputs, largest)
    return [torch.cat(parts) for parts in seen]
