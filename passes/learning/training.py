"""The loop of a training: steps of Adam in phases, told, saved, interrupted and resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.contract import Context
from thresher.passes.learning import checkpoint
from thresher.passes.learning.schedule import cosine, settled

SAVE_EVERY = 25  # steps between checkpoints
FORMAT = 1  # of the state in a checkpoint
Step = tuple[Tensor, Sequence[float]]  # what is minimised, and numbers to tell


def nothing() -> None:
    """What most phases begin with."""


def first(told: Sequence[float]) -> float:
    """What most trainings come to rest by."""
    return told[0]


@dataclass(frozen=True)
class Phase:
    """One phase of a training.

    Attributes:
        text: what the user reads of a step, a format of the numbers it tells.
        steps: at most so many.
        rates: of each group of parameters, from which they fall by half a cosine; at 0 a group stays.
        loss: of a step's number.
        begin: done once, before the first step.
    """

    text: str
    steps: int
    rates: tuple[float, ...]
    loss: Callable[[int], Step]
    begin: Callable[[], object] = nothing


@dataclass(frozen=True)
class Keeping:
    """Where the state of a training is kept, and what it is of.

    Attributes:
        context: its folder of checkpoints, if there is one, and who is told of progress.
        name: of the file.
        fingerprint: what must agree for a checkpoint to be of this training.
    """

    context: Context
    name: str
    fingerprint: Mapping[str, Any]


class Training:
    """Groups of parameters by name, trained in place.

    A phase ends after its steps, or when the mean of ``rest_by`` of what was told has not sunk for ``patience``
    of them.  Gradients are averaged over all processes of the job, and cut to the norm
    ``steepest`` if one is given.  ``history`` has the numbers told, by phase and step.

    Raises:
        UsageError: a checkpoint of another run is in the way.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Tensor]],
        phases: Sequence[Phase],
        keeping: Keeping,
        patience: int,
        rest_by: Callable[[Sequence[float]], float] = first,
        steepest: float | None = None,
    ) -> None:
        self.groups, self.phases, self.keeping = groups, phases, keeping
        self.patience, self.rest_by, self.steepest = patience, rest_by, steepest
        self.history: list[list[list[float]]] = []
        self._optimizer: torch.optim.Adam | None = None
        self._resume()

    @property
    def phase(self) -> int:
        """The number of the present phase."""
        return len(self.history) - 1

    def run(self) -> None:
        """All phases, from where the last run stopped."""
        for number, phase in enumerate(self.phases):
            if number == len(self.history):
                self._begin(phase)
            while number + 1 == len(self.history) and not self._ended(phase):
                self._advance(phase)

    def _begin(self, phase: Phase) -> None:
        phase.begin()
        self.history.append([])
        self._optimizer = self._fresh(phase)
        if len(self.history) > 1:
            self._save()

    def _ended(self, phase: Phase) -> bool:
        rows = self.history[-1]
        return len(rows) >= phase.steps or settled([*map(self.rest_by, rows)], self.patience)

    def _advance(self, phase: Phase) -> None:
        rows, optimizer = self.history[-1], self._optimizer
        assert optimizer is not None
        for group, rate in zip(optimizer.param_groups, phase.rates, strict=True):
            group["lr"] = cosine(rate, len(rows), phase.steps)
        optimizer.zero_grad()
        total, told = phase.loss(len(rows))
        torch.autograd.backward(total)
        every = [p for group in self.groups for p in group.values() if p.grad is not None]
        for parameter in every:
            assert parameter.grad is not None
            workers.mean(parameter.grad)
        if self.steepest is not None:
            torch.nn.utils.clip_grad_norm_(every, self.steepest)
        optimizer.step()
        rows.append(workers.mean(torch.tensor(told, dtype=torch.float64)).tolist())
        try:
            self._tell(phase)
        except KeyboardInterrupt:
            self._save()
            raise
        if len(rows) % SAVE_EVERY == 0:
            self._save()

    def _tell(self, phase: Phase) -> None:
        limits = [phase.steps for phase in self.phases]
        rows, before = self.history[-1], sum(limits[: len(self.history) - 1])
        self.keeping.context.progress(phase.text.format(*rows[-1]), before + len(rows), sum(limits))

    def _fresh(self, phase: Phase) -> torch.optim.Adam:
        for group, rate in zip(self.groups, phase.rates, strict=True):
            for parameter in group.values():
                parameter.requires_grad_(bool(rate))
        return torch.optim.Adam([{"params": [*group.values()]} for group in self.groups], lr=0.0)

    @property
    def _fingerprint(self) -> dict[str, Any]:
        return {**self.keeping.fingerprint, "format": FORMAT}

    def _save(self) -> None:
        folder = self.keeping.context.checkpoints
        if folder is None or workers.rank() != 0:
            return
        assert self._optimizer is not None
        state = {
            "parameters": [{n: p.detach() for n, p in group.items()} for group in self.groups],
            "optimizer": self._optimizer.state_dict(),
            "history": self.history,
        }
        checkpoint.save(folder / f"{self.keeping.name}.pt", self._fingerprint, state)

    def _resume(self) -> None:
        folder = self.keeping.context.checkpoints
        path = None if folder is None else folder / f"{self.keeping.name}.pt"
        state = None if path is None else checkpoint.load(path, self._fingerprint)
        if state is None:
            return
        with torch.no_grad():
            for group, stored in zip(self.groups, state["parameters"], strict=True):
                for name, parameter in group.items():
                    parameter.copy_(stored[name])
        self.history = state["history"]
        self._optimizer = self._fresh(self.phases[len(self.history) - 1])
        self._optimizer.load_state_dict(state["optimizer"])
