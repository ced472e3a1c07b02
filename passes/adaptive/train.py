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
from torch import Tensor, fx

from thresher.compiler import workers
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.analysis.linears import bias_of, operand, stored_values
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program
from thresher.passes.adaptive import losses
from thresher.passes.adaptive.calibrate import calibrated, shares
from thresher.passes.adaptive.forward import AdaptiveForward
from thresher.passes.adaptive.job import AcmOptions, Distilled, Job
from thresher.passes.adaptive.learners import Learners, gumbel, straight_through
from thresher.passes.adaptive.losses import Choice
from thresher.passes.learning.batches import Batches
from thresher.passes.learning.loss import choose, unpadded
from thresher.passes.learning.training import Keeping, Phase, Step, Training
from thresher.passes.sparsity.calibration import numbered

DISTIL, GATES, WHOLE = range(3)
RATES = {DISTIL: (1e-3, 0.0), GATES: (0.0, 1e-2), WHOLE: (2e-4, 2e-3)}  # of learners, of gates
TEMPERATURE = 0.8
BUDGET, ENTROPY, DIVERSITY = 1.0, 0.05, 0.05
TOKENS = 2048  # of a batch that phases 1 and 2 look at, in each network
RANKED_ON = 4  # batches


def distil(job: Job[AcmOptions]) -> Distilled:
    """Train the modules of a Program's feed-forward networks to a budget.

    Raises:
        UsageError: there is no data or too little, or a checkpoint of another run is in the way.
    """
    with workers.joined():
        return _Training(job).run()


class _Training:
    """Modules and their training.  Every step tells the loss and the share of the work."""

    def __init__(self, job: Job[AcmOptions]) -> None:
        data = job.context.data
        if data is None:
            raise UsageError("training adaptive modules needs data: add --learn-data DATA")
        self.job, self.options = job, job.options
        self.loss_name, self.loss = choose(job.program, data, job.options.loss)
        labels = self.loss_name == "labels"
        self.batches = Batches(data, job.context.batch, job.context.seed, labels=labels)
        self.modules = cut(job, self.batches)
        self.forward = AdaptiveForward(job.program, job.ffns, self.modules)
        self.macs = [module.macs for module in self.modules]
        own, told = job.options, "training {}: loss {{:.4f}}, feed-forward work {{:.3f}}"
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
        return Distilled(self.modules, tuple(found), share, tilt, self.loss_name, steps, rows)

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
        """Site, inputs ``[T, D]`` and outputs ``[T, D]`` of the dense networks."""
        return self.forward.tokens(self.batches.at(step)[0], TOKENS, self._generator(step))

    def _generator(self, step: int) -> torch.Generator:
        """Of one step's random numbers, so that a resumed training draws the same."""
        number = (self.job.context.seed * 3 + self.training.phase) * 1_000_003 + step
        return workers.generator(number)

    def _calibrate(self) -> float:
        return calibrated(self.forward, self.modules, self.batches, self.options.budget)


def cut(job: Job[AcmOptions], batches: Batches) -> list[Learners]:
    """Modules that are the dense networks, the neurons that matter most in the first learners.

    A neuron matters as ``E|h_i| |w2_i|``: what it adds to the output on the first batches of
    all workers, whose neurons so have one order.
    """
    forward = AdaptiveForward(job.program, job.ffns, [])
    networks = [dense(job.program, ffn) for ffn in job.ffns]
    size = [torch.zeros(ffn.width, dtype=torch.float64) for ffn in job.ffns]
    with torch.no_grad():
        for step in range(RANKED_ON):
            for index, (x, _) in forward.watched(batches.at(step)[0]).items():
                size[index] += networks[index].hidden(x).abs().double().flatten(0, -2).mean(0)
    made = []
    for network, mean in zip(networks, size, strict=True):
        effect = workers.mean(mean) * network.w2[0].detach().double().norm(dim=1)
        order = effect.argsort(descending=True, stable=True)
        made.append(network.cut(order, job.options.learners))
    return made


def dense(program: Program, ffn: FFN) -> Learners:
    """A feed-forward network as one learner."""
    stored, form = stored_values(program), ffn.form
    assert form is not None

    def rows(linear: fx.Node, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        bias = bias_of(linear)
        chosen = slice(start, start + count)
        return stored[operand(linear, 1)][chosen], None if bias is None else stored[bias][chosen]

    bent, factor = form.bent, form.factor
    return Learners.dense(
        rows(bent.linear, bent.start, ffn.width),
        None if factor is None else rows(factor.linear, factor.start, ffn.width),
        rows(ffn.down, 0, ffn.down.meta["val"].shape[-1]),
        form.activation,
    )
