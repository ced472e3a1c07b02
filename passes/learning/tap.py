"""A Program run with an ear on some of its nodes, or a hand in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx

import thresher.kernels.ops  # noqa: F401  (registers the operators that the graph may call)
from thresher.compiler.analysis.attention import SDPA, Attention
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.analysis.flow import origin
from thresher.compiler.program import Program
from thresher.kernels.class_attention.reference import class_attention
from thresher.passes.tokens.sizes import visible

Tap: TypeAlias = Callable[[Tensor], Tensor | None]
Taps: TypeAlias = Mapping[fx.Node, Tap]


class Tapped(fx.Interpreter):
    """Runs a Program eagerly; a tap sees a node's value and may return another in its place."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)
        self.extra_traceback = False  # what a tap raises stays one sentence
        self.program = program
        sites = find_sites(program)
        self.class_token = sites.class_token
        self._mask = sites.padding
        self._before = [] if self._mask is None else origin(program.graph, self._mask)
        self._alive: Tensor | None = None
        self._taps: Taps = {}
        self._attended: tuple[Tensor, Tensor, Tensor | None, float] | None = None

    def outputs(self, inputs: Mapping[str, Tensor], taps: Taps) -> dict[str, Tensor]:
        """Outputs by name."""
        arguments = self.program.placeholder_values(inputs)
        with torch.inference_mode():
            self._taps, self._alive = taps, self._visible(arguments)
            results: Sequence[Tensor] = self.run(*arguments)
        return dict(zip([spec.name for spec in self.program.outputs], results, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is SDPA:
            found = Attention(n)
            mask = None if found.mask is None else self.env[found.mask]
            self._attended = (self.env[found.q], self.env[found.k], mask, found.scale)
        tap = self._taps.get(n)
        changed = None if tap is None else tap(value)
        return value if changed is None else changed

    @property
    def alive(self) -> Tensor | None:
        """``[B, N]`` bool of the last run: which tokens are no padding; None if nothing says so."""
        return self._alive

    def _visible(self, arguments: Sequence[Tensor]) -> Tensor | None:
        """``[B, N]`` bool from the mask: an input, or what the graph may compute behind the first tokens."""
        if self._mask is None:
            return None
        places = (n for n in self.program.graph.nodes if n.op == "placeholder")
        values: dict[fx.Node, Any] = dict(zip(places, arguments, strict=True))
        for node in self._before:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
        return visible(values[self._mask]) > 0

    def rows(self, value: Tensor) -> Tensor:
        """``[..., C] -> [T, C]`` float32 or wider: the vectors of all tokens that are no padding."""
        return real_rows(value, self._alive)

    def class_attention(self) -> Tensor:
        """``[B, N]``: what the class token pays to each token in the last attention so far."""
        assert self._attended is not None
        assert self.class_token is not None
        q, k, mask, scale = self._attended
        return class_attention(q, k, mask, scale, self.class_token)


def real_rows(value: Tensor, alive: Tensor | None) -> Tensor:
    """``[..., C] -> [T, C]`` float32 or wider: those that are alive, all where shapes differ."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    if alive is None or tuple(value.shape[:-1]) != tuple(alive.shape):
        return wide.reshape(-1, value.shape[-1])
    return wide[alive]
