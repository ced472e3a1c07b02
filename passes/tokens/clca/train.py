"""Head and cache token in training: the model is frozen, and the model before its reduction is the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.contract import Context, Options
from thresher.compiler.ledger import Recorder
from thresher.compiler.program import Program
from thresher.passes.learning.batches import Batches
from thresher.passes.learning.identity import identity
from thresher.passes.learning.loss import distillation
from thresher.passes.learning.options import DistilledBy, Patience, Rate
from thresher.passes.learning.saved import numbered
from thresher.passes.learning.training import Keeping, Phase, Step, Training
from thresher.passes.tokens.clca import head
from thresher.passes.tokens.clca.place import TOKEN, Place
from thresher.passes.tokens.modules.student import Teacher, outputs_with, values_with

FITTED_ON = 4  # items for each channel that the head's beginning is fitted on, at most
STEEPEST = 1.0  # norm to which gradients are cut


class ClcaOptions(Options):
    """Whether there is a cache, and how head and cache token are trained, or where they come from."""

    cache: Annotated[
        bool,
        Field(
            description="append what earlier blocks held where tokens left; false is the head alone"
        ),
    ] = True
    steps: Annotated[int, Field(ge=0, description="most steps of training")] = 300
    rate: Rate = 1e-3
    loss: DistilledBy = "auto"
    patience: Patience = 100
    calibration: Annotated[
        Path | None, Field(description="head and token trained here before, instead of a training")
    ] = None


@dataclass(frozen=True)
class Trained:
    """Tensors of the graph by name, and how the training went (the loss of each step)."""

    weights: Mapping[str, Tensor]
    loss: str = ""
    history: list[float] = field(default_factory=list)


def train(place: Place, options: ClcaOptions, context: Context) -> Trained:
    """Train head and token.

    Raises:
        UsageError: there is too little data, or a checkpoint of another run is in the way.
    """
    with workers.joined():
        return HeadTraining(place, options, context).run()


class HeadTraining:
    """Head and token in training on what the graph itself computes with them."""

    def __init__(self, place: Place, options: ClcaOptions, context: Context) -> None:
        data = context.data
        assert data is not None
        self.place, self.teacher = place, Teacher(place.dense, None)
        self.loss_name, self.loss = distillation(place.dense, data, options.loss)
        self.batches = Batches(data, context.batch, context.seed, labels=self.loss_name == "labels")
        self.token = self._token() if options.cache else {}
        self.head, self.stats = self._fitted()
        phase = Phase("training clca: loss {:.4f}", options.steps, (options.rate,), self._loss)
        fingerprint: dict[str, Any] = {
            **identity(place.program, context),
            "pass": place.name,
            **options.model_dump(mode="json", exclude={"calibration"}),
        }
        self.training = Training(
            [{**self.head, **self.token}], [phase],
            Keeping(context, numbered(place.program, place.name), fingerprint), options.patience,
            steepest=STEEPEST,
        )  # fmt: skip

    def run(self) -> Trained:
        """Train until the loss settles or the steps are used up."""
        self.training.run()
        weights = {name: tensor.detach() for name, tensor in self._weights().items()}
        return Trained(weights, self.loss_name, [row[0] for row in self.training.history[0]])

    def _weights(self) -> dict[str, Tensor]:
        return {**head.folded(self.head, self.stats), **self.token}

    def _loss(self, step: int) -> Step:
        inputs, labels = self.batches.at(step)
        dense, _ = self.teacher.outputs(inputs)
        found = outputs_with(self.place.inserted, inputs, self._named(self._weights()))
        total = self.loss(found, dense, labels)
        return total, [float(total.detach())]

    def _named(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.place.stored[name]: tensor for name, tensor in weights.items()}

    # --- beginnings ---------------------------------------------------------------------------

    def _token(self) -> dict[str, Tensor]:
        """The class token as the first block reads it, on average over the first batch."""
        inputs, _ = next(self.batches.first(1))
        start = self.place.anatomy.starts[0].name
        seen = _seen(self.place.program, inputs, start, {})
        return {TOKEN: seen[:, self.place.anatomy.class_token].float().mean(0)}

    def _fitted(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A head fitted to the dense model on the first items."""
        stacked, logits = list[Tensor](), list[Tensor]()
        program = self.place.inserted
        given = self._named(self.token)
        for inputs, _ in self.batches.first(FITTED_ON * self.place.width):
            stacked.append(_seen(program, inputs, self.place.stacked, given))
            logits.extend(self.teacher.outputs(inputs)[0].values())
        return head.initial(torch.cat(stacked), torch.cat(logits))


def _seen(
    program: Program,
    inputs: Mapping[str, Tensor],
    wanted: str,
    instead: Mapping[str, Tensor],
) -> Tensor:
    """What a node holds, with other tensors in some placeholders."""
    recorder = Recorder(program.exported.graph_module, {wanted})
    with torch.no_grad():
        recorder.run(*values_with(program, inputs, instead))
    found: Tensor = recorder.found[wanted]
    return found
