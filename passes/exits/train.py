"""The head of an exit trained on what the dense model computes, and the confidence from which it is right enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from thresher.compiler.contract import Context
from thresher.compiler.program import Program
from thresher.passes.exits.head import Head, HeadForward
from thresher.passes.learning.batches import Batch, Batches
from thresher.passes.learning.identity import identity
from thresher.passes.learning.loss import choose
from thresher.passes.learning.options import LossName
from thresher.passes.learning.training import Keeping, Phase, Step, Training

HELD_OUT = 1024  # items at most, as a threshold for tenths of a point needs many
NEVER = 2.0  # a confidence that no item has


class Schedule(Protocol):
    """How long and by what is trained."""

    block: int | None
    steps: int
    rate: float
    patience: int

    @property
    def loss(self) -> LossName: ...


@dataclass(frozen=True)
class Judged:
    """Held-out items: how sure the exit is, and whether it and the dense model are right.

    Right is what the label says, and without labels what the dense model says.
    """

    confidence: Tensor
    early: Tensor
    late: Tensor

    def threshold(self, max_drop: float) -> float:
        """The least confidence from which items may leave: no more than ``max_drop`` points are lost by that.

        Every higher threshold loses no more either.  :data:`NEVER` where none may.
        """
        order = self.confidence.argsort(descending=True, stable=True)
        lost = (self.late.double() - self.early.double())[order].cumsum(0) / len(order) * 100
        levels = self.confidence[order]
        whole = torch.cat([levels[1:] != levels[:-1], torch.ones(1, dtype=torch.bool)])
        levels, kept = levels[whole], lost[whole] <= max_drop + 1e-9  # equal ones leave together
        allowed = int(kept.long().cumprod(0).sum())
        return float(levels[allowed - 1]) if allowed else NEVER

    def at(self, threshold: float) -> tuple[float, float]:
        """The share of items that leave, and how many points that loses."""
        leaves = self.confidence >= threshold
        lost = torch.where(leaves, self.late.double() - self.early.double(), 0.0)
        return float(leaves.double().mean()), float(lost.mean()) * 100

    def part(self, rows: slice) -> Judged:
        """Some of the items."""
        return Judged(self.confidence[rows], self.early[rows], self.late[rows])


def confidence(logits: Tensor) -> Tensor:
    """``[B, C] -> [B]``: the largest probability."""
    return logits.float().softmax(-1).amax(-1)


class HeadTraining:
    """A head that learns; the model is frozen.

    Raises:
        UsageError: there is too little data, or a checkpoint of another run is in the way.
    """

    def __init__(
        self,
        program: Program,
        head: Head,
        early: fx.Node,
        schedule: Schedule,
        context: Context,
        name: str,
    ) -> None:
        assert context.data is not None
        self.loss_name, self.loss = choose(program, context.data, schedule.loss)
        labels = context.data.labels is not None
        self.batches = Batches(
            context.data, context.batch, context.seed, labels=labels, held=HELD_OUT
        )
        self.forward = HeadForward(program, head, early)
        self.output = program.outputs[0].name
        self.weights = {node: tensor.clone() for node, tensor in head.weights.items()}
        phase = Phase(
            "training the exit: loss {:.4f}", schedule.steps, (schedule.rate,), self._loss
        )
        fingerprint: dict[str, Any] = {
            **identity(program, context),
            "exit": early.name,
            **{key: getattr(schedule, key) for key in ("steps", "rate", "patience", "loss")},
        }
        parameters = {node.name: tensor for node, tensor in self.weights.items()}
        self.training = Training(
            [parameters], [phase], Keeping(context, name, fingerprint), schedule.patience
        )

    @property
    def history(self) -> list[float]:
        """The loss of each step."""
        return [row[0] for rows in self.training.history for row in rows]

    def run(self) -> None:
        """All steps, or as many as bring something."""
        self.training.run()

    def judged(self) -> Judged:
        """Held-out items in their order."""
        parts = [self._judge(batch) for batch in self.batches.held_out()]
        return Judged(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _judge(self, batch: Batch) -> Sequence[Tensor]:
        inputs, labels = batch
        seen, dense = self.forward.seen(inputs)
        with torch.no_grad():
            early = self.forward.early_output(seen, self.weights)
        wanted = dense.argmax(-1) if labels is None else labels
        return confidence(early), early.argmax(-1) == wanted, dense.argmax(-1) == wanted

    def _loss(self, step: int) -> Step:
        inputs, labels = self.batches.at(step)
        seen, dense = self.forward.seen(inputs)
        early = self.forward.early_output(seen, self.weights)
        total = self.loss({self.output: early}, {self.output: dense}, labels)
        return total, [float(total.detach())]


def kept(weights: Mapping[fx.Node, Tensor]) -> dict[str, Tensor]:
    """Trained weights by ``"head.placeholder"``."""
    return {f"head.{node.name}": tensor.detach() for node, tensor in weights.items()}
