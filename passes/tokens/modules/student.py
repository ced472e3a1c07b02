"""The model with modules in training, and the dense model that teaches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, fx

from thresher.compiler.ledger import Recorder
from thresher.compiler.program import Program
from thresher.passes.learning.loss import Outputs
from thresher.passes.tokens.reduce import Reduction, Weights
from thresher.passes.tokens.sizes import visible

Inputs = Mapping[str, Tensor]


class Student(Protocol):
    """Runs the model as it is trained."""

    def trained(
        self, inputs: Inputs, weights: Weights, generator: torch.Generator
    ) -> tuple[Outputs, Tensor]:
        """Outputs by name, and what is added to the loss; both with gradients to the weights."""


class Rewritten:
    """The reduced graph itself: for steps that are differentiable in their weights."""

    def __init__(self, reduced: Program, reduction: Reduction) -> None:
        self.program = reduced
        self.places = [
            (node.name, layer, name)
            for layer, tensors in reduction.stored.items()
            for name, node in tensors.items()
        ]

    def trained(
        self, inputs: Inputs, weights: Weights, generator: torch.Generator
    ) -> tuple[Outputs, Tensor]:
        ours = {node: weights[layer][name] for node, layer, name in self.places}
        return outputs_with(self.program, inputs, ours), torch.zeros(())


class Teacher:
    """The dense model, and what it has at some of its nodes."""

    def __init__(self, program: Program, padding: fx.Node | None) -> None:
        self.program, self.padding = program, padding

    def outputs(self, inputs: Inputs) -> tuple[Outputs, Tensor | None]:
        """Outputs by name, and which tokens ``[B, N]`` are no padding, if that is known."""
        wanted = [] if self.padding is None else [self.padding]
        results, seen = self._run(inputs, wanted)
        alive = None if self.padding is None else visible(seen[self.padding]) > 0
        return _named(self.program, results), alive

    def values(self, inputs: Inputs, wanted: list[fx.Node]) -> dict[fx.Node, Tensor]:
        """Of some nodes."""
        return self._run(inputs, wanted)[1]

    def _run(
        self, inputs: Inputs, wanted: list[fx.Node]
    ) -> tuple[list[Tensor], dict[fx.Node, Tensor]]:
        recorder = Recorder(self.program.exported.graph_module, {node.name for node in wanted})
        with torch.no_grad():
            results = recorder.run(*self.program.placeholder_values(inputs))
        return results, {node: recorder.found[node.name] for node in wanted}


def outputs_with(program: Program, inputs: Inputs, instead: Mapping[str, Tensor]) -> Outputs:
    """Outputs by name, with gradients to tensors that stand in some placeholders."""
    values = values_with(program, inputs, instead)
    return _named(program, fx.Interpreter(program.exported.graph_module).run(*values))


def values_with(program: Program, inputs: Inputs, instead: Mapping[str, Tensor]) -> list[Tensor]:
    """Of all placeholders in order, with other tensors in some of them, by their names in the graph."""
    names = (node.name for node in program.graph.nodes if node.op == "placeholder")
    values = zip(names, program.placeholder_values(inputs), strict=True)
    return [instead.get(name, value) for name, value in values]


def _named(program: Program, results: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip([spec.name for spec in program.outputs], results, strict=True))
