"""The forward that routers are trained by: every token stays in its place, and those that skip are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from thresher.compiler.analysis.sites import Sites
from thresher.compiler.program import Program
from thresher.passes.depth.spans import Span
from thresher.passes.learning.loss import Outputs
from thresher.passes.tokens.budget import Count, Limits
from thresher.passes.tokens.learning.masked import MaskedForward
from thresher.passes.tokens.step import LOWEST


class RoutedForward(MaskedForward):
    """Runs a Program whose tokens skip spans; its values are those of the graph with :class:`Bypass`.

    A token that skips is no key inside a span and keeps its value behind it.  What it would have
    added, as a query of those that run, is computed nevertheless: by it the gradient tells its router
    whether it should have run.
    """

    def __init__(self, program: Program, sites: Sites, spans: Sequence[Span], count: Count) -> None:
        super().__init__(program, sites)
        self.count, self.limits = count, Limits(sites.protected)
        self._entries = {span.before: span for span in spans}
        self._exits = {span.behind for span in spans}
        self._routers: Mapping[str, Tensor] = {}
        self._real: Tensor | None = None
        self._before = self._runs = torch.empty(0)

    def routed(
        self, inputs: Mapping[str, Tensor], routers: Mapping[str, Tensor], real: Tensor | None
    ) -> Outputs:
        """Outputs by name, with gradients to the routers.

        Args:
            routers: by part ``[C + 1]``, weights and bias.
            real: ``[B, N]``, which tokens are no padding; None where nobody knows.
        """
        self._routers, self._real = routers, real
        return self.outputs(inputs, {})

    def run_node(self, n: fx.Node) -> Any:
        """One node; where a span ends and begins tokens come back and leave."""
        inside, value = self._alive, super().run_node(n)
        self._alive = inside  # padding is left to the model's own mask
        if n in self._exits:
            value = torch.lerp(self._before, value, self._runs[..., None].to(value.dtype))
            self._alive = None
        if n in self._entries:
            self._before, self._runs = value, self._chosen(self._entries[n], value)
            self._alive = self._runs
        return value

    def _chosen(self, span: Span, x: Tensor) -> Tensor:
        router = self._routers[span.part.name]
        score = F.linear(x.float(), router[None, :-1], router[-1:]).squeeze(-1)
        if self._real is not None:
            score = torch.where(self._real, score, torch.full_like(score, LOWEST))
        keep = self.count.of(x.shape[1], self.limits)
        return running(score, keep, self.limits.protected)


def running(score: Tensor, keep: int, protected: int) -> Tensor:
    """``[B, N]``: 1 for the tokens that run, which are the prefix and the best-scored others, 0 for those that do not.

    Straight-through: the gradient is that of ``sigmoid(score - t)``, where t lies between the last
    that runs and the first that does not.
    """
    behind = score[:, protected:]
    best, order = behind.detach().sort(dim=1, descending=True, stable=True)
    count = keep - protected
    hard = torch.zeros_like(behind).scatter(1, order[:, :count], 1.0)
    between = best[:, max(count - 1, 0) : count + 1].mean(1, keepdim=True)
    soft = (behind - between).sigmoid()
    chosen = hard + (soft - soft.detach())  # in this order the value is exactly 0 or 1
    return torch.cat([torch.ones_like(score[:, :protected]), chosen], dim=1)
