"""Models in two graphs: the host runs one, and the other with what the first hands on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from thresher.compiler.errors import UsageError
from thresher.compiler.handed import CORE, HANDED, LEAVES
from thresher.runtime.feeds import Array, describe
from thresher.runtime.generate import PAST
from thresher.runtime.manifest import Ranges, TensorInfo
from thresher.runtime.runner import Runnable


def demand_match(
    first: Runnable, second: Runnable, prefix: str, remedy: str
) -> dict[str, TensorInfo]:
    """What the first graph hands on and the second takes, by name.

    Raises:
        UsageError: the two are not made for each other; says what to do.
    """
    handed = {spec.name: spec for spec in first.outputs if spec.name.startswith(prefix)}
    wanted = {spec.name: spec for spec in second.inputs if spec.name.startswith(prefix)}
    for name in {**handed, **wanted}:
        ours, theirs = handed.get(name), wanted.get(name)
        if ours is None or theirs is None or ours != theirs:
            told = ["nothing" if s is None else describe(s) for s in (ours, theirs)]
            raise UsageError(
                f"{first.name} hands on {told[0]} as {name} and {second.name} takes {told[1]}: {remedy}"
            )
    return handed


class TwoGraphs:
    """A graph of prompts and one of steps as one :class:`~thresher.runtime.runner.Runnable`.

    It keeps what the last prompt handed on.  A run with an empty past is a prompt; every other one continues
    the last prompt.

    Raises:
        UsageError: the two are not made for each other.
    """

    def __init__(self, prompt: Runnable, steps: Runnable) -> None:
        for model, specs in ((prompt, prompt.outputs), (steps, steps.inputs)):
            if not any(spec.name.startswith(CORE) for spec in specs):
                graph = "prompt" if model is prompt else "steps"
                raise UsageError(
                    f"{model.name} is no graph of {'prompts' if model is prompt else 'steps'}: make it with"
                    f" --recipe core-neurons --set graph={graph}"
                )
        demand_match(prompt, steps, CORE, "make both of one model with the same options but graph")
        self._prompt, self._steps = prompt, steps
        self._past = next(spec.name for spec in prompt.inputs if spec.name.startswith(PAST))
        self._handed: dict[str, Array] = {}
        self.name = f"{prompt.name} and {steps.name}"
        self.inputs: tuple[TensorInfo, ...] = prompt.inputs
        self.outputs: tuple[TensorInfo, ...] = steps.outputs
        self.ranges: Ranges = prompt.ranges
        self.precision, self.reduced = prompt.precision, prompt.reduced
        self.changed_by = steps.changed_by

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            UsageError: an input does not fit, or steps come before any prompt.
        """
        if inputs[self._past].shape[2] == 0:
            outputs = self._prompt.run(inputs)
            self._handed = {name: outputs.pop(name) for name in [*outputs] if name.startswith(CORE)}
            return outputs
        if not self._handed:
            raise UsageError(
                f"{self.name}: read a prompt first, which picks the neurons of the steps"
            )
        return self._steps.run({**inputs, **self._handed})


@dataclass
class Left:
    """How many of the items that came left early."""

    early: int = 0
    items: int = 0

    def __str__(self) -> str:
        share = self.early / self.items if self.items else 0.0
        return f"{self.early} of {self.items} items left early ({share:.1%})"


class EarlyExit:
    """A graph that some items leave, and the rest for the others; ``left`` counts.

    A batch goes through the first graph; what is not done there goes on as a smaller batch.  Where the
    rest takes no batch so small it is filled up with copies.

    Raises:
        UsageError: the two are not made for each other.
    """

    def __init__(self, first: Runnable, rest: Runnable) -> None:
        self._handed = demand_match(
            first, rest, HANDED, "export the Program again, which makes both"
        )
        self._first, self._rest, self.left = first, rest, Left()
        axis = rest.inputs[0].shape[0]
        self._least = axis if isinstance(axis, int) else rest.ranges.get(axis, (1, None))[0]
        self._alike = {spec.name for spec in rest.inputs if spec.shape[:1] == (axis,)}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; outputs are those of the whole model, in the order of the items.

        Raises:
            UsageError: an input does not fit.
        """
        answers = self._first.run(inputs)
        leaves = answers.pop(LEAVES)
        handed = {name: answers.pop(name) for name in self._handed}
        on = np.flatnonzero(~leaves)
        self.left.early += len(leaves) - len(on)
        self.left.items += len(leaves)
        if not on.size:
            return answers
        rows = np.concatenate([on, on[-1:].repeat(max(0, self._least - len(on)))])
        given = {**inputs, **handed}
        if len(rows) != len(leaves) or len(on) < len(leaves):
            given = {n: value[rows] if n in self._alike else value for n, value in given.items()}
        late = self._rest.run(given)
        for name, value in late.items():
            answers[name] = answers[name].copy()  # a back end may not let its results be written to
            answers[name][on] = value[: len(on)]
        return answers
