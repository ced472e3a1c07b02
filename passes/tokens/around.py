"""Rewrites a Program so that fewer tokens run through its self-attentions, and all through the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx

from thresher.compiler.analysis.sites import TOKEN_AXIS
from thresher.compiler.program import Program
from thresher.passes.tokens.attention_span import AttentionSpan
from thresher.passes.tokens.budget import Count, Limits
from thresher.passes.tokens.combine import mlerp
from thresher.passes.tokens.lengths import Lengths
from thresher.passes.tokens.reduce import Reduction, Version
from thresher.passes.tokens.sizes import initial_sizes
from thresher.passes.tokens.step import Merge, StepResult

MERGE = torch.ops.thresher.bipartite_merge.default
GATHER = torch.ops.thresher.gather_tokens.default
SLOT, KEPT = 2, 3  # outputs of bipartite_merge


def limits(span: AttentionSpan) -> Limits:
    """What can be left of the tokens of a span."""
    return Limits(span.sites.protected, halves=True)


class Around(Reduction):
    """Tokens merge before an attention and read their group's result behind it, in a version of their own.

    Args:
        spans: in program order.
        count: of the tokens that run through a span.
        proportional: add log sizes to the logits.
        preserves_norm: means keep the length of the longest token in them.
    """

    def __init__(
        self,
        program: Program,
        spans: Sequence[AttentionSpan],
        count: Count,
        name: str,
        *,
        proportional: bool,
        preserves_norm: bool,
    ) -> None:
        sites = spans[0].sites
        nothing = (None,) * len(sites.sites)  # leaves for good
        step = Merge(by_index=True, preserves_norm=preserves_norm)
        super().__init__(program, sites, step, nothing, name, proportional)
        self.count, self.preserves_norm = count, preserves_norm
        self.spans = {node: span for span in spans for node in span.inner}
        self.entries = {span.before: span for span in spans}
        self.exits = {span.behind: span for span in spans}
        self.inside: dict[int, int] = {}  # versions by layer
        self.span = spans[0]

    def _visit(self, node: fx.Node) -> None:
        span = self.spans.get(node)
        if span is None or node in self.rewriter.map:
            super()._visit(node)
            return
        with self._in(span):
            super()._visit(node)

    def _behind(self, node: fx.Node) -> None:
        if node in self.exits:
            self._come_back(self.exits[node])
        if node in self.entries:
            self._leave(self.entries[node])

    @contextmanager
    def _in(self, span: AttentionSpan) -> Iterator[None]:
        """What stands before a span is fewer tokens to the nodes in it, and to no others."""
        before, version = span.before, self.inside[span.layer]
        whole = self.rewriter.map[before]
        self.span, self.sites = span, span.sites
        self.lengths = Lengths(self.rewriter, span.sites)
        self.rewriter.map[before] = self.versions[version].x
        self.version_of[before] = version
        yield
        self.rewriter.map[before] = whole
        del self.version_of[before]

    def _leave(self, span: AttentionSpan) -> None:
        x, compared = self.rewriter.map[span.before], self.rewriter.map[span.compared]
        self.rewriter.at(span.before, site=span.layer, path=span.path)
        keep = self.count.emit(self.rewriter, self.rewriter.size(x, TOKEN_AXIS), limits(span))
        real = self._real if span.sites.padding is not None else None
        sizes = initial_sizes(self.rewriter, x) if real is None else real
        metric = self.rewriter.emit(torch.ops.aten.unsqueeze.default, compared, 1)
        node = self.rewriter.emit(MERGE, x, sizes, metric, keep, span.sites.protected, True)
        y, size, slot, kept = self.rewriter.outputs(node)
        if self.preserves_norm:
            y = self.rewriter.inline(mlerp, x, sizes, y, size, slot, kept)
        step = StepResult(node, y, size, slot, kept, SLOT, KEPT)
        self.versions.append(Version(y, self.rewriter.size(y, TOKEN_AXIS), size, step, x))
        self.inside[span.layer] = len(self.versions) - 1

    def _come_back(self, span: AttentionSpan) -> None:
        version = self.versions[self.inside[span.layer]]
        assert version.step is not None
        self.rewriter.at(span.behind, site=span.layer, path=span.path)
        merged = self.rewriter.map[span.behind]
        self.rewriter.map[span.behind] = self.rewriter.emit(GATHER, merged, version.step.slot)
        del self.version_of[span.behind]

    def _batched(self, node: fx.Node) -> bool:
        axes, before = self.sites.axes.of(node), self.sites.axes.of(self.span.before)
        return bool(axes) and axes[0] == before[0]
