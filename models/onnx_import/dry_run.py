"""A dry run of an ONNX graph: which values are constant, and which shapes the others have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from thresher.models.onnx_import.evaluate import compute
from thresher.models.onnx_import.folding import fold
from thresher.models.onnx_import.node import Node
from thresher.models.onnx_import.values import HOST_LIMIT, Host, Value, of_tensor


@dataclass
class Facts:
    """What a dry run found out about the values of a graph, by name."""

    constants: dict[str, torch.Tensor]  # real tensors, the file's own and folded ones
    static: dict[str, Host] = field(default_factory=dict)  # shape arithmetic with a known result
    shapes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # of everything else
    sizes: dict[str, Any] = field(default_factory=dict)  # shape arithmetic of one symbolic item
    needed: set[str] = field(default_factory=set)  # constants that were used as tensors
    made: set[str] = field(default_factory=set)  # constants that raising made of weights

    def known(self, name: str) -> bool:
        return not name or name in self.constants or name in self.static


@dataclass(frozen=True)
class Input:
    """A model input: its dtype and its sizes, where a string is a symbol."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def example(self, sizes: Mapping[str, int]) -> torch.Tensor:
        shape = [size if isinstance(size, int) else sizes[size] for size in self.shape]
        return torch.zeros(shape, dtype=self.dtype)


class DryRun:
    """Runs nodes on fake tensors with symbolic sizes; nodes on constants are folded for real."""

    def __init__(
        self, inputs: Iterable[Input], sizes: Mapping[str, int], constants: dict[str, torch.Tensor]
    ) -> None:
        self.facts = Facts(dict(constants))
        self.environment = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        self._values: dict[str, Value] = {}
        self._symbols: dict[str, Any] = {}
        for spec in inputs:
            # symbols have different sizes, so equal sizes are one symbol (duck shaping)
            dynamic = [
                DimDynamic.DUCK if isinstance(size, str) else DimDynamic.STATIC
                for size in spec.shape
            ]
            value = self._mode.from_tensor(
                spec.example(sizes),
                source=ConstantSource(spec.name),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic),
            )
            self._values[spec.name] = value
            self.facts.shapes[spec.name] = _shape(value)
            for name, size in zip(spec.shape, value.shape, strict=True):
                if isinstance(name, str):
                    self._symbols.setdefault(name, size)

    def run(self, nodes: Iterable[Node]) -> Facts:
        facts = self.facts
        for node in nodes:
            if all(facts.known(name) for name in node.inputs):
                for name, value in zip(node.outputs, self._fold(node), strict=False):
                    if isinstance(value, Host):
                        facts.static[name] = value
                    else:
                        facts.constants[name] = value
                continue
            values = [self._fetch(name) for name in node.inputs]  # reads real tensors: no mode yet
            # as in torch.export, this dispatcher keeps sizes symbolic inside composite operators
            with enable_python_dispatcher(), self._mode:
                outputs = compute(node, values)
            for name, value in zip(node.outputs, outputs, strict=False):
                if isinstance(value, Host) and value.static:
                    facts.static[name] = value
                else:
                    self._values[name] = value
                    facts.shapes[name] = _shape(value)
                    if isinstance(value, Host) and value.items.size == 1:
                        facts.sizes[name] = value.items.item()
        return facts

    def _fold(self, node: Node) -> list[Value]:
        """Constants go in as tensors, so that folding rounds as the file's maker would."""
        static, constants = self.facts.static, self.facts.constants
        return fold(
            node, [constants.get(name, static.get(name)) if name else None for name in node.inputs]
        )

    def _fetch(self, name: str) -> Value | None:
        if not name:
            return None
        facts = self.facts
        if name in facts.static:
            return facts.static[name]
        if name not in facts.constants:
            return self._values[name]
        tensor = facts.constants[name]

        def use() -> torch.Tensor:
            facts.needed.add(name)
            return self._mode.from_tensor(tensor, static_shapes=True)

        return of_tensor(tensor, use) if tensor.numel() <= HOST_LIMIT else use()

    def shape(self, name: str) -> tuple[Any, ...]:
        return self.facts.shapes[name]

    def symbols(self) -> dict[str, Any]:
        """What became of each symbol of the inputs: an expression, or an int if it is fixed."""
        found: dict[str, Any] = {}
        for name, size in self._symbols.items():
            expression = self.environment.simplify(size.node.expr)
            found[name] = int(expression) if expression.is_number else expression
        return found


def _shape(value: Value) -> tuple[Any, ...]:
    return tuple(value.items.shape if isinstance(value, Host) else value.shape)
