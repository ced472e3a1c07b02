"""Distillation in three phases: learners one by one, gates by the learners' errors, then end to end.

Wójcik et al. (AAAI 2025) train phase 3 for some hundred epochs, all weights.  Here a few hundred steps
on a frozen backbone have to do, so that the budget weighs more than the published 0.1, the gates of
phase 3 set out from the budget, and one number added to their logits meets it exactly in the end.
The task's loss reaches the gates, straight through; in the published code it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.errors import UsageError
from thresher.passes.adaptive import losses
from thresher.passes.adaptive.calibrate import calibrated, shares
from thresher.passes.adaptive.forward import AdaptiveForward
from thresher.passes.adaptive.job import AcmOptions, Distilled, Job
from thresher.passes.adaptive.learners import Learners, gumbel, straight_through
from thresher.passes.adaptive.losses import Choice
from thresher.passes.adaptive.sites import Site
from thresher.passes.adaptive.start import begin
from thresher.passes.learning.batches import Batches
from thresher.passes.learning.loss import choose, unpadded
from thresher.passes.learning.saved import numbered
from thresher.passes.learning.training import Keeping, Phase, Step, Training

DISTIL, GATES, WHOLE = range(3)
RATES = {DISTIL: (1e-3, 0.0), GATES: (0.0, 1e-2), WHOLE: (2e-4, 2e-3)}  # of learners, of gates
TEMPERATURE = 0.8
BUDGET, ENTROPY, DIVERSITY = 1.0, 0.05, 0.05
TOKENS = 2048  # of a batch that phases 1 and 2 look at, in each network


def distil(job: Job[Site, AcmOptions]) -> Distilled:
    """Train the modules of a Program's sites to a budget.

    Raises:
        UsageError: there is no data or too little, or a checkpoint of another run is in the way.
    """
    with workers.joined():
        return _Training(job).run()


class _Training:
    """Modules and their training.  Every step tells the loss and the share of the work."""

    def __init__(self, job: Job[Site, AcmOptions]) -> None:
        data = job.context.data
        if data is None:
            raise UsageError("training adaptive modules needs data: add --learn-data DATA")
        self.job, self.options = job, job.options
        self.loss_name, self.loss = choose(job.program, data, job.options.loss)
        labels = self.loss_name == "labels"
        self.batches = Batches(data, job.context.batch, job.context.seed, labels=labels)
        self.modules, self.kept = begin(job, self.batches)
        self.forward = AdaptiveForward(job.program, job.sites, self.modules)
        self.macs = [module.macs for module in self.modules]
        own, told = job.options, "training {}: loss {{:.4f}}, work of modules {{:.3f}}"
        phases = (
            Phase(told.format("learners"), own.distil_steps, RATES[DISTIL], self._distil),
            Phase(told.format("gates"), own.gate_steps, RATES[GATES], self._train_gates),
            Phase(
                told.format("all together"),
                own.steps,
                RATES[WHOLE],
                self._train_whole,
                begin=self._calibrate,
            ),
        )
        groups = [self._named(Learners.trained), self._named(Learners.gates)]
        keeping = Keeping(job.context, numbered(job.program, "acm"), job.fingerprint)
        self.training = Training(groups, phases, keeping, own.patience)

    def run(self) -> Distilled:
        """All phases, then the calibration."""
        self.training.run()
        tilt = self._calibrate()
        found, share = shares(self.forward, self.modules, self.batches.held_out())
        history = self.training.history
        rows = [[float(phase), *row] for phase, told in enumerate(history) for row in told]
        steps = tuple(map(len, history))
        return Distilled(
            self.modules, self.kept, tuple(found), share, tilt, self.loss_name, steps, rows
        )

    def _named(self, which: Callable[[Learners], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Parameters of all modules by name and site."""
        return {
            f"{name}.{site}": parameter
            for site, module in enumerate(self.modules)
            for name, parameter in which(module).items()
        }

    # --- the three losses -----------------------------------------------------------------------

    def _distil(self, step: int) -> Step:
        terms = []
        for index, x, y in self._tokens(step):
            terms.append(losses.distillation(self.modules[index].prefixes(x), y))
        total = torch.stack(terms).mean()
        return total, [float(total.detach()), 1.0]

    def _train_gates(self, step: int) -> Step:
        terms, run = [], 0.0
        for index, x, y in self._tokens(step):
            module = self.modules[index]
            with torch.no_grad():
                labels = losses.gate_labels(module.prefixes(x), y)
            logits = module.logits(x)
            terms.append(F.cross_entropy(logits, labels))
            run += float(logits.detach().argmax(-1).double().mean()) / module.count
        total = torch.stack(terms).mean()
        return total, [float(total.detach()), run / len(terms)]

    def _train_whole(self, step: int) -> Step:
        inputs, labels = self.batches.at(step)
        generator = self._generator(step)
        choices: list[Choice] = []

        def sampled(site: int, logits: Tensor) -> Tensor:
            noise = gumbel(logits.shape, generator, logits.dtype)
            made = straight_through(logits, noise, TEMPERATURE)
            choices.append(Choice(made, self.forward.alive(logits), self.macs[site]))
            return made

        outputs = self.forward.adaptive(inputs, sampled)
        outputs = unpadded(outputs, self.forward.visible)
        by_labels = self.loss_name == "labels"
        dense = {} if by_labels else unpadded(self.forward.dense(inputs), self.forward.visible)
        task = self.loss(outputs, dense, labels)
        total = (
            task
            + BUDGET * losses.budget(choices, self.options.budget)
            + ENTROPY * losses.negative_entropy(choices)
            - DIVERSITY * losses.diversity(choices)
        )
        return total, [float(task.detach()), float(losses.share(choices).detach())]

    def _tokens(self, step: int) -> list[tuple[int, Tensor, Tensor]]:
        """Site, inputs ``[T, D]`` and outputs ``[T, D]`` of what is dense."""
        return self.forward.tokens(self.batches.at(step)[0], TOKENS, self._generator(step))

    def _generator(self, step: int) -> torch.Generator:
        """Of one step's random numbers, so that a resumed training draws the same."""
        number = (self.job.context.seed * 3 + self.training.phase) * 1_000_003 + step
        return workers.generator(number)

    def _calibrate(self) -> float:
        return calibrated(self.forward, self.modules, self.batches, self.options.budget)
