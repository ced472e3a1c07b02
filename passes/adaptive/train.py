"""Distillation in three phases: learners one by one, gates by the learners' errors, then end to end.

Wójcik et al. (AAAI 2025) train phase 3 for some hundred epochs, all weights.  Here a few hundred steps
on a frozen backbone have to do, so that the budget weighs more than the published 0.1, the gates of
phase 3 set out from the budget, and one number added to their logits meets it exactly in the end.
The task's loss reaches the gates, straight through; in the published code it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from thresher.passes.adaptive.job import Distilled, Job
from thresher.passes.adaptive.learners import Learners, gumbel, straight_through
from thresher.passes.adaptive.losses import Choice
from thresher.passes.learning import checkpoint
from thresher.passes.learning.batches import Batches
from thresher.passes.learning.loss import choose, unpadded
from thresher.passes.learning.schedule import cosine, settled
from thresher.passes.sparsity.calibration import numbered

DISTIL, GATES, WHOLE = range(3)
RATES = {DISTIL: (1e-3, 0.0), GATES: (0.0, 1e-2), WHOLE: (2e-4, 2e-3)}  # of learners, of gates
TEMPERATURE = 0.8
BUDGET, ENTROPY, DIVERSITY = 1.0, 0.05, 0.05
TOKENS = 2048  # of a batch that phases 1 and 2 look at, in each network
RANKED_ON = 4  # batches
SAVE_EVERY = 25  # steps between checkpoints
Loss = tuple[Tensor, float, float]  # what is minimised; the loss and the share of work to tell


def distil(job: Job) -> Distilled:
    """Train the modules of a Program's feed-forward networks to a budget.

    Raises:
        UsageError: there is no data or too little, or a checkpoint of another run is in the way.
    """
    with workers.joined():
        return _Training(job).run()


class _Training:
    """Modules, optimiser and history of one training."""

    def __init__(self, job: Job) -> None:
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
        self.phase, self.step = DISTIL, 0
        self.finished: list[int] = []
        self.history: list[list[float]] = []
        self.optimizer = self._optimizer()
        self._resume()

    def run(self) -> Distilled:
        """All phases, then the calibration."""
        phases: Sequence[tuple[int, Callable[[int], Loss]]] = (
            (self.options.distil_steps, self._distil),
            (self.options.gate_steps, self._train_gates),
            (self.options.steps, self._train_whole),
        )
        while self.phase < len(phases):
            limit, loss = phases[self.phase]
            while self.step < limit and not self._settled():
                self._advance(loss, limit)
            self._next_phase()
        tilt = self._calibrate()
        found, share = shares(self.forward, self.modules, self.batches.held_out())
        return Distilled(
            self.modules, tuple(found), share, tilt, self.loss_name,
            tuple(self.finished), self.history,
        )  # fmt: skip

    def _advance(self, loss: Callable[[int], Loss], limit: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, RATES[self.phase], strict=True):
            group["lr"] = cosine(rate, self.step, limit)
        self.optimizer.zero_grad()
        total, task, share = loss(self.step)
        torch.autograd.backward(total)
        for module in self.modules:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    workers.mean(parameter.grad)
        self.optimizer.step()
        told = workers.mean(torch.tensor([task, share], dtype=torch.float64))
        self.history.append([self.phase, *told.tolist()])
        self.step += 1
        try:
            self._tell()
        except KeyboardInterrupt:
            self._save()
            raise
        if self.step % SAVE_EVERY == 0:
            self._save()

    def _next_phase(self) -> None:
        self.finished.append(self.step)
        self.phase, self.step = self.phase + 1, 0
        if self.phase == WHOLE:
            self._calibrate()
        self.optimizer = self._optimizer()
        self._save()

    # --- the three losses -----------------------------------------------------------------------

    def _distil(self, step: int) -> Loss:
        terms = []
        for index, x, y in self._tokens(step):
            terms.append(losses.distillation(self.modules[index].prefixes(x), y))
        total = torch.stack(terms).mean()
        return total, float(total.detach()), 1.0

    def _train_gates(self, step: int) -> Loss:
        terms, run = [], 0.0
        for index, x, y in self._tokens(step):
            module = self.modules[index]
            with torch.no_grad():
                labels = losses.gate_labels(module.prefixes(x), y)
            logits = module.logits(x)
            terms.append(F.cross_entropy(logits, labels))
            run += float(logits.detach().argmax(-1).double().mean()) / module.count
        total = torch.stack(terms).mean()
        return total, float(total.detach()), run / len(terms)

    def _train_whole(self, step: int) -> Loss:
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
        return total, float(task.detach()), float(losses.share(choices).detach())

    def _tokens(self, step: int) -> list[tuple[int, Tensor, Tensor]]:
        """Site, inputs ``[T, D]`` and outputs ``[T, D]`` of the dense networks, at the same tokens in all."""
        seen = self.forward.watched(self.batches.at(step)[0])
        generator, found = self._generator(step), []
        chosen: dict[int, Tensor] = {}
        for index, (rows, results) in sorted(seen.items()):
            if len(rows) not in chosen:
                chosen[len(rows)] = torch.randperm(len(rows), generator=generator)[:TOKENS]
            at = chosen[len(rows)]
            found.append((index, rows[at], results[at]))
        return found

    def _generator(self, step: int) -> torch.Generator:
        """Of one step's random numbers, so that a resumed training draws the same."""
        number = (self.job.context.seed * 3 + self.phase) * 1_000_003 + step
        return torch.Generator().manual_seed(number * workers.count() + workers.rank())

    # --- state ----------------------------------------------------------------------------------

    def _calibrate(self) -> float:
        return calibrated(self.forward, self.modules, self.batches, self.options.budget)

    def _optimizer(self) -> torch.optim.Adam:
        learners = [p for module in self.modules for p in module.trained()]
        gates = [p for module in self.modules for p in module.gates()]
        for group, trains in zip((learners, gates), RATES.get(self.phase, (0, 0)), strict=True):
            for parameter in group:
                parameter.requires_grad_(bool(trains))
        return torch.optim.Adam([{"params": learners}, {"params": gates}], lr=0.0)

    def _settled(self) -> bool:
        losses = [row[1] for row in self.history if row[0] == self.phase]
        return settled(losses, self.options.patience)

    def _tell(self) -> None:
        names = ("learners", "gates", "all together")
        limits = (self.options.distil_steps, self.options.gate_steps, self.options.steps)
        _, loss, share = self.history[-1]
        text = f"training {names[self.phase]}: loss {loss:.4f}, feed-forward work {share:.3f}"
        self.job.context.progress(text, sum(limits[: self.phase]) + self.step, sum(limits))

    def _file(self) -> Path | None:
        folder = self.job.context.checkpoints
        name = numbered(self.job.program, "acm")
        return None if folder is None else folder / f"{name}.pt"

    def _save(self) -> None:
        path = self._file()
        if path is None or workers.rank() != 0:
            return
        state = {
            "modules": [module.state_dict() for module in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "phase": self.phase,
            "step": self.step,
            "finished": self.finished,
            "history": self.history,
        }
        checkpoint.save(path, self.job.fingerprint, state)

    def _resume(self) -> None:
        path = self._file()
        state: dict[str, Any] | None = (
            None if path is None else checkpoint.load(path, self.job.fingerprint)
        )
        if state is None:
            return
        for module, stored in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(stored)
        self.phase, self.step = state["phase"], state["step"]
        self.finished, self.history = state["finished"], state["history"]
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])


def cut(job: Job, batches: Batches) -> list[Learners]:
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
