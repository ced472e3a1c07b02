"""A Program run with an ear on some of its nodes, or a hand in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx

import thresher.kernels.ops  # noqa: F401  (registers the operators that the graph may call)
from thresher.compiler.analysis.sites import find_sites, origin
from thresher.compiler.program import Program
from thresher.passes.tokens.sizes import visible

Tap: TypeAlias = Callable[[Tensor], Tensor | None]
Taps: TypeAlias = Mapping[fx.Node, Tap]


class Tapped(fx.Interpreter):
    """Runs a Program eagerly; a tap sees a node's value and may return another in its place."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)
        self.program = program
        padding = find_sites(program).padding
        self._mask = [] if padding is None else origin(program.graph, padding)
        self._alive: Tensor | None = None
        self._taps: Taps = {}

    def outputs(self, inputs: Mapping[str, Tensor], taps: Taps) -> dict[str, Tensor]:
        """Outputs by name."""
        arguments = self.program.placeholder_values(inputs)
        with torch.inference_mode():
            self._taps, self._alive = taps, self._visible(arguments)
            results: Sequence[Tensor] = self.run(*arguments)
        return dict(zip([spec.name for spec in self.program.outputs], results, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        tap = self._taps.get(n)
        changed = None if tap is None else tap(value)
        return value if changed is None else changed

    def _visible(self, arguments: Sequence[Tensor]) -> Tensor | None:
        """``[B, N]`` bool from the mask, which the graph may compute behind the first tokens."""
        if not self._mask:
            return None
        places = (n for n in self.program.graph.nodes if n.op == "placeholder")
        values: dict[fx.Node, Any] = dict(zip(places, arguments, strict=True))
        for node in self._mask:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
        return visible(values[self._mask[-1]]) > 0

    def rows(self, value: Tensor) -> Tensor:
        """``[..., C] -> [T, C]`` float32 or wider: the vectors of all tokens that are no padding."""
        alive = self._alive
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        if alive is None or tuple(value.shape[:-1]) != tuple(alive.shape):
            return wide.reshape(-1, value.shape[-1])
        return wide[alive]
