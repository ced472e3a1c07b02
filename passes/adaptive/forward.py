"""A Program run with some parts of it watched, or with something else in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.operators import in_any_layout
from thresher.compiler.program import Program
from thresher.passes.adaptive.learners import Learners, running
from thresher.passes.adaptive.sites import Site
from thresher.passes.tokens.sizes import visible

Instead = Callable[[int, Tensor], Tensor]  # of a site's number and what it reads: what it writes


class NetworkForward(fx.Interpreter):
    """Runs a Program; its own weights are frozen."""

    def __init__(self, program: Program, sites: Sequence[Site]) -> None:
        super().__init__(program.exported.graph_module)
        self.program = program
        self._first = {site.linears[0]: site for site in sites}
        self._down = {site.down: site for site in sites}
        self._x: dict[int, Tensor] = {}
        self._inner = frozenset[fx.Node]().union(*(site.inner for site in sites))
        self._padding = find_sites(program).padding
        self.visible: Tensor | None = None  # of the last run
        self._instead: Instead | None = None
        self._seen: dict[int, tuple[Tensor, Tensor]] | None = None

    def watched(self, inputs: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """By site, what the dense part reads and writes where there is no padding: ``[T, D]`` both."""
        self._instead, self._seen = None, {}
        with torch.no_grad():
            self.run(*self.program.placeholder_values(inputs))
        seen, self._seen = self._seen, None
        return seen

    def tokens(
        self, inputs: Mapping[str, Tensor], most: int, generator: torch.Generator
    ) -> list[tuple[int, Tensor, Tensor]]:
        """Sites with what :meth:`watched` gives at ``most`` tokens, the same in all that have as many."""
        found, chosen = list[tuple[int, Tensor, Tensor]](), dict[int, Tensor]()
        for index, (rows, results) in sorted(self.watched(inputs).items()):
            if len(rows) not in chosen:
                chosen[len(rows)] = torch.randperm(len(rows), generator=generator)[:most]
            at = chosen[len(rows)]
            found.append((index, rows[at], results[at]))
        return found

    def dense(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of the dense model by name."""
        self._instead = None
        with torch.no_grad():
            return self._named(inputs)

    def replaced(self, inputs: Mapping[str, Tensor], instead: Instead) -> dict[str, Tensor]:
        """Outputs by name, with gradients, where ``instead`` stands at every site."""
        self._instead = instead
        return self._named(inputs)

    def alive(self, value: Tensor) -> Tensor:
        """``[B, N]``, dtype of the value ``[B, N, C]``: 0 for tokens that are padding in the last run, else 1.

        Behind a pass that removes tokens nothing is known of padding, and all count.
        """
        if self.visible is None or self.visible.shape != value.shape[:2]:
            return value.new_ones(value.shape[:2])
        return self.visible.to(value.dtype)

    def run_node(self, n: fx.Node) -> Any:
        """One node; what is dense is left out where something stands for it."""
        if n is self._padding:
            found = super().run_node(n)
            self.visible = visible(found)
            return found
        first = self._first.get(n)
        if first is not None:
            assert first.x is not None
            self._x[first.layer] = self.env[first.x]
        if self._instead is not None and n in self._inner:
            return None
        site = self._down.get(n)
        if site is None:
            return super().run_node(n)
        x = self._x.pop(site.layer)
        if self._instead is not None:
            return self._instead(site.layer, x)
        y = super().run_node(n)
        if self._seen is not None:
            real = self.alive(x) > 0
            self._seen[site.layer] = (x[real], y[real])
        return y

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``view`` runs as ``reshape``: a module's result may have another memory layout."""
        return super().call_function(in_any_layout(target), args, kwargs)

    def _named(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        results = self.run(*self.program.placeholder_values(inputs))
        return dict(zip((spec.name for spec in self.program.outputs), results, strict=True))


class AdaptiveForward(NetworkForward):
    """Runs a Program with adaptive modules at its sites.

    ``choose`` gets a site's number and the logits ``[B, N, L + 1]`` of its gate and returns one-hot
    choices of the same shape.
    """

    def __init__(
        self, program: Program, sites: Sequence[Site], modules: Sequence[Learners]
    ) -> None:
        super().__init__(program, sites)
        self.modules = modules

    def adaptive(
        self, inputs: Mapping[str, Tensor], choose: Callable[[int, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Outputs by name, with gradients."""

        def module(site: int, x: Tensor) -> Tensor:
            own = self.modules[site]
            return own.mixed(x, running(choose(site, own.logits(x))))

        return self.replaced(inputs, module)
