"""The eager module that computes an ONNX graph; ``torch.export`` turns it into a Program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from thresher.models.onnx_import.dry_run import Facts
from thresher.models.onnx_import.evaluate import compute
from thresher.models.onnx_import.names import dotted
from thresher.models.onnx_import.node import Node
from thresher.models.onnx_import.values import HOST_LIMIT, Host, Value, of_tensor

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "LayerNormalization", "BatchNormalization", "Linear")


class Scope(nn.Module):
    """A module of the original model: holds its parameters and computes its nodes.

    Calling nodes through it makes ``torch.export`` note the module's path on what it traces.
    """

    def forward(self, node: Node, values: list[Value | None]) -> list[Value]:
        return compute(node, values)


class OnnxModule(Scope):
    """``forward`` takes the graph's inputs by name and returns the tuple of its outputs.

    Args:
        inputs: names in the graph and names for ``forward``.
        outputs: names in the graph.
        own: constants that the file named as weights; they become parameters, others buffers.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        facts: Facts,
        inputs: Mapping[str, str],
        outputs: Sequence[str],
        own: set[str],
    ) -> None:
        super().__init__()
        self.nodes, self._inputs, self._outputs = nodes, dict(inputs), list(outputs)
        self._places: dict[str, tuple[Scope, str]] = {}
        self._hosts: dict[str, Host] = dict(facts.static)
        for node in nodes:  # weights that were folded have lost their names
            if node.op in _WEIGHTED:
                own = own.union(node.inputs[1:3])
        # torch would differentiate by a parameter, which it refuses for running statistics
        norms = (node for node in nodes if node.op == "BatchNormalization")
        own = own.difference(name for node in norms for name in node.inputs[3:])
        for name in sorted(facts.needed | {n for n in outputs if n in facts.constants}):
            self._register(name, facts.constants[name], name in own)
        used = {name for node in nodes for name in node.inputs}
        for name in sorted(used.intersection(facts.constants)):
            tensor = facts.constants[name]
            if tensor.numel() <= HOST_LIMIT:
                self._hosts[name] = of_tensor(tensor, partial(self._tensor, name))
        self._scopes = [self._scope(node.scope) for node in nodes]
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, keyword) for name in self._inputs.values()]
        self.forward = self._named(inspect.Signature(parameters))  # type: ignore[method-assign]

    def _register(self, name: str, tensor: torch.Tensor, weight: bool) -> None:
        path, _, leaf = dotted(name).rpartition(".")
        scope = self._scope(path)
        while hasattr(scope, leaf):
            leaf += "_"
        if weight and tensor.is_floating_point():
            scope.register_parameter(leaf, nn.Parameter(tensor))
        else:
            scope.register_buffer(leaf, tensor)
        self._places[name] = (scope, leaf)

    def _scope(self, path: str) -> Scope:
        """The submodule of a path, made when it is new."""
        here: Scope = self
        for part in path.split(".") if path else ():
            while hasattr(here, part) and part not in here._modules:
                part += "_"
            if part not in here._modules:
                here.add_module(part, Scope())
            here = here._modules[part]  # type: ignore[assignment]
        return here

    def _tensor(self, name: str) -> torch.Tensor:
        scope, leaf = self._places[name]
        tensor: torch.Tensor = getattr(scope, leaf)
        return tensor

    def _named(self, signature: inspect.Signature) -> Any:
        """``evaluate`` as a function whose parameters have the inputs' names."""

        def forward(*values: Any, **named: Any) -> tuple[torch.Tensor, ...]:
            return self.evaluate(signature.bind(*values, **named).arguments)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        return forward

    def evaluate(self, arguments: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        known: dict[str, Value] = {graph: arguments[name] for graph, name in self._inputs.items()}

        def fetch(name: str) -> Value | None:
            if not name:
                return None
            if name in known:
                return known[name]
            return self._hosts[name] if name in self._hosts else self._tensor(name)

        for node, scope in zip(self.nodes, self._scopes, strict=True):
            values = [fetch(name) for name in node.inputs]
            made = compute(node, values) if scope is self else scope(node, values)
            known.update(zip(node.outputs, made, strict=False))
        results = [fetch(name) for name in self._outputs]
        return tuple(r.tensor() if isinstance(r, Host) else r for r in results if r is not None)
