"""A Program run with an ear on some of its nodes, or a hand in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

import thresher.kernels.ops  # noqa: F401  (registers the operators that the graph may call)
from thresher.compiler.analysis.sites import SDPA, Attention, find_sites
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
        self._padding, self.class_token = sites.padding, sites.class_token
        self._alive: Tensor | None = None
        self._taps: Taps = {}
        self._attended: tuple[Tensor, Tensor, Tensor | None, float] | None = None

    def outputs(self, inputs: Mapping[str, Tensor], taps: Taps) -> dict[str, Tensor]:
        """Outputs by name."""
        self._taps, self._alive = taps, None
        with torch.inference_mode():
            results: Sequence[Tensor] = self.run(*self.program.placeholder_values(inputs))
        return dict(zip([spec.name for spec in self.program.outputs], results, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n is self._padding:
            self._alive = visible(value) > 0
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
