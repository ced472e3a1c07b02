"""A causal language model in two graphs: one reads prompts, the other makes steps with what the first hands on."""

from __future__ import annotations

from collections.abc import Mapping

from thresher.compiler.errors import UsageError
from thresher.runtime.feeds import Array, describe
from thresher.runtime.generate import HANDED, PAST
from thresher.runtime.manifest import Ranges, TensorInfo
from thresher.runtime.runner import Runnable


class TwoGraphs:
    """Both graphs as one :class:`~thresher.runtime.runner.Runnable`, which keeps what the last prompt handed on.

    A run with an empty past is a prompt; every other one continues the last prompt.

    Raises:
        UsageError: the two are not made for each other.
    """

    def __init__(self, prompt: Runnable, steps: Runnable) -> None:
        handed = {spec.name: spec for spec in prompt.outputs if spec.name.startswith(HANDED)}
        wanted = {spec.name: spec for spec in steps.inputs if spec.name.startswith(HANDED)}
        for model, specs in ((prompt, handed), (steps, wanted)):
            if not specs:
                graph = "prompt" if model is prompt else "steps"
                raise UsageError(
                    f"{model.name} is no graph of {'prompts' if model is prompt else 'steps'}: make it with"
                    f" --recipe core-neurons --set graph={graph}"
                )
        for name in {**handed, **wanted}:
            ours, theirs = handed.get(name), wanted.get(name)
            if ours is None or theirs is None or ours != theirs:
                told = ["nothing" if s is None else describe(s) for s in (ours, theirs)]
                raise UsageError(
                    f"{prompt.name} hands on {told[0]} as {name} and {steps.name} takes {told[1]}: make both"
                    " of one model with the same options but graph"
                )
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
            self._handed = {
                name: outputs.pop(name) for name in [*outputs] if name.startswith(HANDED)
            }
            return outputs
        if not self._handed:
            raise UsageError(
                f"{self.name}: read a prompt first, which picks the neurons of the steps"
            )
        return self._steps.run({**inputs, **self._handed})
