"""What "p per cent worse" means for a model, and the search for the point where it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, pow
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.compiler.analysis.attention import SDPA
from thresher.compiler.contract import Dataset
from thresher.compiler.program import Program
from thresher.passes.learning.tap import Tapped, Taps

TOLERANCE = 5e-4  # of a rise: 0.05 percentage points
STEPS = 24  # evaluations of a search, at most
Outputs: TypeAlias = dict[str, Tensor]
Kind: TypeAlias = Literal["perplexity", "cross-entropy", "divergence", "error"]
_MEANING: dict[Kind, str] = {
    "perplexity": "perplexity of the next token",
    "cross-entropy": "exponential of the cross-entropy to the labels",
    "divergence": "exponential of the divergence from the dense model's answers (there are no labels)",
    "error": "mean relative error of the outputs against the dense model's (there are no answers)",
}


@dataclass(frozen=True)
class Criterion:
    """How a sparse run is judged: a mean loss over the items, and its rise over the dense one.

    Except for ``"error"`` the rise is ``exp(L_sparse - L_dense) - 1``.
    """

    kind: Kind
    output: str = ""

    @property
    def meaning(self) -> str:
        """In words."""
        return _MEANING[self.kind]

    def rise(self, sparse: float, dense: float) -> float:
        """By which share it is worse."""
        return sparse if self.kind == "error" else exp(min(sparse - dense, 50.0)) - 1

    def loss(
        self, found: Outputs, dense: Outputs, labels: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> tuple[float, float]:
        """The sum of the losses of a batch, and what it is to be divided by."""
        if self.kind == "error":
            pairs = [(found[k].double().flatten(1), dense[k].double().flatten(1)) for k in found]
            errors = [(a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-30) for a, b in pairs]
            return float(torch.stack(errors).mean(0).sum()), float(len(errors[0]))
        logits = found[self.output]
        if self.kind == "divergence":
            logits, target = (x.double().flatten(0, -2) for x in (logits, dense[self.output]))
            loss = F.kl_div(
                logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True
            )
            return float(loss), float(len(logits))
        if self.kind == "perplexity":
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            real = torch.ones_like(ids) if mask is None else mask
            seen = (real[:, 1:] * real[:, :-1]).bool()
            logits, labels = logits[:, :-1][seen], ids[:, 1:][seen]
        assert labels is not None
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return float(losses.double().sum()), float(len(labels))


def choose(program: Program, data: Dataset) -> Criterion:
    """The criterion that model and data allow."""
    shapes = {spec.name: spec.shape for spec in program.outputs}
    logits = next((name for name in shapes if name == "logits"), None)
    if logits is None and program.info.labels is not None:
        logits = next((name for name, shape in shapes.items() if len(shape) == 2), None)
    if logits is None:
        return Criterion("error")
    words = len(shapes[logits]) == 3 and "input_ids" in {name for name, _ in program.named_inputs()}
    if words and is_causal(program):
        return Criterion("perplexity", logits)
    labelled = data.labels is not None and np.issubdtype(data.labels.dtype, np.integer)
    if labelled and len(shapes[logits]) == 2:
        return Criterion("cross-entropy", logits)
    return Criterion("divergence", logits)


def is_causal(program: Program) -> bool:
    """Whether it is a decoder with a cache, or every attention is said to hide what comes later."""
    if any(spec.name.startswith("present.") for spec in program.outputs):
        return True
    attentions = [n for n in program.graph.nodes if n.target is SDPA]
    flags = [bool(n.kwargs.get("is_causal", len(n.args) > 5 and n.args[5])) for n in attentions]
    return bool(flags) and all(flags)


class Judge:
    """The rise over the dense model on some items, of whatever taps do."""

    def __init__(
        self,
        program: Program,
        data: Dataset,
        items: Sequence[int],
        criterion: Criterion,
        batch: int,
    ) -> None:
        self.tapped, self.data, self.criterion = Tapped(program), data, criterion
        self.items = len(items)
        self.batches = [items[i : i + batch] for i in range(0, len(items), batch)]
        keeps = criterion.kind in ("error", "divergence")
        self._dense: list[Outputs] = []
        if keeps:
            self._dense = [self.tapped.outputs(self._take(b)[0], {}) for b in self.batches]
        self.dense = self._loss({})

    def rise(self, taps: Taps) -> float:
        """By which share the model is worse with these taps."""
        return self.criterion.rise(self._loss(taps), self.dense)

    def rise_of(self, changed: Program) -> float:
        """By which share another Program is worse than the dense one."""
        return self.criterion.rise(self._loss({}, Tapped(changed)), self.dense)

    def _take(self, items: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        arrays, labels = self.data.take(items)
        known = self.criterion.kind == "cross-entropy" and labels is not None
        target = torch.from_numpy(np.asarray(labels)).long() if known else None
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, target

    def _loss(self, taps: Taps, changed: Tapped | None = None) -> float:
        runner, total, weight = changed or self.tapped, 0.0, 0.0
        for number, items in enumerate(self.batches):
            inputs, labels = self._take(items)
            found = runner.outputs(inputs, taps)
            dense = self._dense[number] if self._dense else {}
            loss, count = self.criterion.loss(found, dense, labels, inputs)
            total, weight = total + loss, weight + count
        return total / max(weight, 1.0)


def largest(
    rise: Callable[[float], float],
    wanted: float,
    top: float = 1.0,
    known: dict[float, float] | None = None,
) -> tuple[float, float]:
    """The c in [0, top] with ``rise(c)`` nearest below or at ``wanted + TOLERANCE``, and its rise.

    The search guesses along the power law through the two ends and halves instead wherever a guess gained less than
    that, until the rise is within :data:`TOLERANCE`; ``known`` keeps what was evaluated, so that several searches
    share their runs.  Where even ``top`` is too little, that is returned, and 0 where even that is too much (a graph
    that skips nothing may round in another way).
    """
    seen = {} if known is None else known

    def at(c: float) -> float:
        if c not in seen:
            seen[c] = rise(c)
        return seen[c]

    if at(top) <= wanted + TOLERANCE:
        return top, at(top)
    low = max((c for c in seen if seen[c] <= wanted), default=0.0)
    high = min((c for c in seen if c > low and seen[c] > wanted), default=top)
    best = (low, at(low))
    if best[1] > wanted + TOLERANCE:
        return best
    halve = False
    for _ in range(STEPS):
        if abs(best[1] - wanted) <= TOLERANCE:
            break
        width, middle = high - low, (low + high) / 2
        probe = middle if halve else _power_law(low, at(low), high, at(high), wanted)
        found = at(probe)
        if found <= wanted + TOLERANCE:
            low, best = probe, (probe, found)
        else:
            high = probe
        halve = high - low > width / 2
    return best


def _power_law(low: float, least: float, high: float, most: float, wanted: float) -> float:
    """Where ``a c^b`` through two points takes a value, well inside of them; their middle where no law fits."""
    if not 0 < least < wanted < most or low <= 0:
        return (low + high) / 2
    share = log(wanted / least) / log(most / least)
    guess, margin = low * pow(high / low, share), 0.02 * (high - low)
    return min(max(guess, low + margin), high - margin)
