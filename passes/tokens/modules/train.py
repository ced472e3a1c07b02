"""A short distillation: modules are trained against the dense model, all other weights stay frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.errors import UsageError
from thresher.passes.learning.batches import Batches
from thresher.passes.learning.loss import distillation, unpadded
from thresher.passes.learning.saved import numbered
from thresher.passes.learning.training import Keeping, Phase, Step, Training
from thresher.passes.tokens.modules.job import Job, Trained
from thresher.passes.tokens.modules.student import Student, Teacher

STEEPEST = 1.0  # norm to which gradients are cut


def train(job: Job, student: Student) -> Trained:
    """Train the modules of a plan.

    Raises:
        UsageError: there is no data or too little, or a checkpoint of another run is in the way.
    """
    with workers.joined():
        return Distillation(job, student).run()


class Distillation:
    """Modules in training, and what they are trained by."""

    def __init__(self, job: Job, student: Student) -> None:
        data = job.context.data
        if data is None:
            raise UsageError(
                f"training the modules of {job.name} needs data: add --learn-data DATA"
            )
        self.job, self.student = job, student
        self.loss_name, self.loss = distillation(job.program, data, job.options.loss)
        labels = self.loss_name == "labels"
        self.batches = Batches(data, job.context.batch, job.context.seed, labels=labels)
        self.teacher = Teacher(job.program, job.plan.sites.padding)
        self.weights = self._initial()
        text = f"training {job.name}: loss {{:.4f}}"
        phase = Phase(text, job.options.steps, (job.options.rate,), self._loss)
        keeping = Keeping(job.context, numbered(job.program, job.name), job.fingerprint)
        parameters = {
            f"{layer}.{name}": tensor
            for layer, module in self.weights.items()
            for name, tensor in module.items()
        }
        self.training = Training(
            [parameters], [phase], keeping, job.options.patience, steepest=STEEPEST
        )

    def run(self) -> Trained:
        """Train until the loss settles or the steps are used up."""
        self.training.run()
        found = {
            layer: {name: tensor.detach() for name, tensor in module.items()}
            for layer, module in self.weights.items()
        }
        history = [loss for rows in self.training.history for (loss,) in rows]
        return Trained(found, self.loss_name, history)

    def _loss(self, step: int) -> Step:
        inputs, labels = self.batches.at(step)
        dense, alive = self.teacher.outputs(inputs)
        found, penalty = self.student.trained(inputs, self.weights, self._generator(step))
        task = self.loss(unpadded(found, alive), unpadded(dense, alive), labels)
        return task + penalty, [float(task.detach())]

    def _initial(self) -> dict[int, dict[str, Tensor]]:
        """Tensors that begin at what the dense model does with the first batch."""
        module, sites = self.job.module, {s.layer: s for s in self.job.plan.sites.sites}
        watched = {place: module.watched(sites[place.layer]) for place in self.job.places}
        wanted = [node for nodes in watched.values() for node in nodes]
        seen = self.teacher.values(self.batches.at(0)[0], wanted)
        generator = torch.Generator().manual_seed(self.job.context.seed)
        return {
            place.layer: module.initial(place, [seen[node] for node in nodes], generator)
            for place, nodes in watched.items()
        }

    def _generator(self, step: int) -> torch.Generator:
        """Of one step's random numbers, so that a resumed training draws the same."""
        number = self.job.context.seed * 1_000_003 + step
        return workers.generator(number)
