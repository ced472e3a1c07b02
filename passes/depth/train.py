"""A short training of routers: the model is frozen, and judges by its answers which tokens should have run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.contract import Context
from thresher.compiler.program import Program
from thresher.passes.depth.probe import Probe, fitted
from thresher.passes.depth.routed import RoutedForward
from thresher.passes.depth.spans import Span
from thresher.passes.learning.batches import Batch, Batches
from thresher.passes.learning.identity import identity
from thresher.passes.learning.loss import distillation, unpadded
from thresher.passes.learning.options import LossName
from thresher.passes.learning.saved import numbered
from thresher.passes.learning.schedule import thinned
from thresher.passes.learning.training import Keeping, Phase, Step, Training
from thresher.passes.tokens.budget import Count
from thresher.passes.tokens.modules.student import Teacher

STEEPEST = 1.0  # norm to which gradients are cut


class Schedule(Protocol):
    """How long and by what is trained."""

    items: int
    steps: int
    rate: float
    patience: int

    @property
    def loss(self) -> LossName: ...


@dataclass(frozen=True)
class Skipping:
    """Which tokens of a Program may skip what."""

    program: Program
    sites: Sites
    spans: Sequence[Span]
    count: Count


class RouterTraining:
    """Routers that learn; each begins as the probe of its part.

    A router is a direction in the stream whose channels have mean 0 and variance 1, so that one
    learning rate serves every model.  :meth:`routers` gives it in the stream as it is.

    Raises:
        UsageError: there is too little data, or a checkpoint of another run is in the way.
    """

    def __init__(self, skipping: Skipping, schedule: Schedule, context: Context, name: str) -> None:
        data, program, spans = context.data, skipping.program, skipping.spans
        assert data is not None
        self.loss_name, self.loss = distillation(program, data, schedule.loss)
        labels = self.loss_name == "labels"
        self.batches = Batches(data, context.batch, context.seed, labels=labels)
        items = self.batches.trained[: schedule.items]
        parts = [span.part for span in spans]
        numbered_name = numbered(program, name)
        probes = fitted(program, parts, context, items, f"{numbered_name}-start")
        self.channels = {part: probe.channels() for part, probe in probes.items()}
        self.directions = {part: direction(probe) for part, probe in probes.items()}
        self.teacher = Teacher(program, skipping.sites.padding)
        self.student = RoutedForward(program, skipping.sites, spans, skipping.count)
        phase = Phase("training routers: loss {:.4f}", schedule.steps, (schedule.rate,), self._loss)
        fingerprint: dict[str, Any] = {
            **identity(program, context),
            "parts": [part.name for part in parts],
            "count": str(skipping.count),
            **{
                key: getattr(schedule, key)
                for key in ("items", "steps", "rate", "patience", "loss")
            },
        }
        keeping = Keeping(context, numbered_name, fingerprint)
        self.begun = self.routers()
        self.training = Training(
            [self.directions], [phase], keeping, schedule.patience, steepest=STEEPEST
        )

    def run(self) -> None:
        """All steps, or as many as bring something."""
        self.training.run()

    def routers(self) -> dict[str, Tensor]:
        """By part ``[C + 1]`` weights and bias, with gradients to what is trained."""
        found = {}
        for part, along in self.directions.items():
            mean, deviation = self.channels[part]
            weight = along / deviation
            found[part] = torch.cat([weight, -(weight @ mean)[None]])
        return found

    def told(self) -> dict[str, Any]:
        """How it went, as plain data; ``held_out`` is the loss there of the probes and of the routers."""
        history = [loss for rows in self.training.history for (loss,) in rows]
        return {
            "loss": self.loss_name,
            "steps": len(history),
            "history": thinned(history),
            "held_out": [self._held_out(routers) for routers in (self.begun, self.routers())],
        }

    def _held_out(self, routers: Mapping[str, Tensor]) -> float:
        total = count = 0.0
        with torch.no_grad():
            for batch in self.batches.held_out():
                items = len(next(iter(batch[0].values())))
                total += float(self._judged(batch, routers)) * items
                count += items
        return total / count

    def _loss(self, step: int) -> Step:
        total = self._judged(self.batches.at(step), self.routers())
        return total, [float(total.detach())]

    def _judged(self, batch: Batch, routers: Mapping[str, Tensor]) -> Tensor:
        inputs, labels = batch
        dense, real = self.teacher.outputs(inputs)
        found = self.student.routed(inputs, routers, real)
        return self.loss(unpadded(found, real), unpadded(dense, real), labels)


def direction(probe: Probe) -> Tensor:
    """``[C]``: a probe as a direction in the stream of unit channels, with scores of variance 1."""
    _, deviation = probe.channels()
    weights = probe.solve()[:-1]
    return weights * deviation / probe.spread(weights)


def trained(
    skipping: Skipping, schedule: Schedule, context: Context, name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """By part its trained router ``[C + 1]``, and how the training went.

    Raises:
        UsageError: there is too little data, or a checkpoint of another run is in the way.
    """
    with workers.joined():
        training = RouterTraining(skipping, schedule, context, name)
        training.run()
        found = {part: router.detach() for part, router in training.routers().items()}
        told = training.told()
    before, after = told["held_out"]
    assert context.data is not None
    note = (
        f"routers trained on {context.data.name} in {told['steps']} steps, all other weights frozen: their loss on"
        f" items held out is {after:.4f}, that of the probes they began as is {before:.4f}"
    )
    return found, {"training": told, "note": note}
