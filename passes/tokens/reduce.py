"""Rewrites a Program so that tokens leave at its sites.

The old graph is copied node by node.  Every tensor that runs over tokens carries a *version*: the
number of reductions it has been through.  Where versions meet, side information (position tables,
masks) follows the tokens; where a node needs every token in its place, tokens are restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx
import torch
from torch import fx
from torch.export import ExportedProgram

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.attention import SDPA, Attention
from thresher.compiler.analysis.flow import dataflow, origin
from thresher.compiler.analysis.sites import TOKEN_AXIS, Site, Sites
from thresher.compiler.errors import RefusedError
from thresher.compiler.program import LedgerEntry, Program, module_path
from thresher.compiler.surgery import Rewriter
from thresher.passes.tokens import follow, restore
from thresher.passes.tokens.budget import Count, Schedule, Size
from thresher.passes.tokens.lengths import Lengths
from thresher.passes.tokens.sizes import (
    add_log_size,
    hide_empty,
    initial_sizes,
    size_weighted_shares,
    validity,
    weighted_mean,
)
from thresher.passes.tokens.step import Step, StepResult
from thresher.passes.tokens.view import SiteView

aten = torch.ops.aten
Weights = Mapping[int, Mapping[str, torch.Tensor]]
"""Learned tensors of a step by the number of the block and by name."""


@dataclass
class Version:
    """The tokens after one reduction of those of ``parent`` (version 0: all of them)."""

    x: fx.Node
    count: fx.Node | int
    size: fx.Node | None
    step: StepResult | None = None
    before: fx.Node | None = None
    parent: int = 0
    followers: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    positions: fx.Node | None = None


class Reduction:
    """One run of a token-reduction method over a Program.

    Args:
        step: what happens at a site.
        schedule: a Count, or None, per site.
        proportional: add log sizes to the logits of every attention behind a merge
            (proportional attention, ToMe section 3).
        weights: of a step that has learned ones; :attr:`stored` tells the names of their placeholders.
    """

    def __init__(
        self,
        program: Program,
        sites: Sites,
        step: Step,
        schedule: Schedule,
        name: str,
        proportional: bool,
        weights: Weights | None = None,
    ) -> None:
        self.program, self.sites, self.step, self.name = program, sites, step, name
        self.schedule = dict(
            zip(
                (s.stream for s in sites.sites),
                zip(sites.sites, schedule, strict=True),
                strict=True,
            )
        )
        self.proportional = proportional and step.merges
        self.rewriter = Rewriter(program, name)
        self.lengths = Lengths(self.rewriter, sites)
        self.versions: list[Version] = []
        self.version_of: dict[fx.Node, int] = {}
        self.masks: dict[fx.Node, fx.Node | None] = {}
        self.dense_map: dict[fx.Node, fx.Node] = {}
        self.ledger: list[LedgerEntry] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.weights = weights or {}
        self.stored: dict[int, dict[str, fx.Node]] = {}
        flow = dataflow(program.graph)
        assert sites.root is not None
        self.stream = nx.descendants(flow, sites.root) | {sites.root}

    @cached_property
    def trunk(self) -> set[fx.Node]:
        """The residual stream."""
        return restore.trunk(dataflow(self.program.graph), self.sites)

    def run(
        self, *, restore_outputs: bool = True
    ) -> tuple[ExportedProgram, tuple[LedgerEntry, ...]]:
        """The rewritten ExportedProgram and its ledger."""
        node: fx.Node
        first_input = next(iter(self.program.input_nodes()))
        for node in self.program.graph.nodes:
            if node.op == "output":
                continue
            if node is first_input:
                self._store_weights()
            self._visit(node)
            if node is self.sites.root and not self.versions:
                x = self.rewriter.map[node]
                self.versions = [Version(x, x.meta["val"].shape[TOKEN_AXIS], None)]
            self._behind(node)
        outputs = [
            self._dense(n)
            if restore_outputs and self.sites.carries_tokens(n)
            else self.rewriter.map[n]
            for n in self.program.output_nodes()
        ]
        return self.rewriter.finish(outputs, self.constants), tuple(self.ledger)

    def _store_weights(self) -> None:
        for layer, tensors in self.weights.items():
            self.stored[layer] = {}
            for name, tensor in tensors.items():
                node = self.rewriter.constant(
                    f"{self.name}_{layer}_{name}".replace("-", "_"), tensor
                )
                self.stored[layer][name], self.constants[node.name] = node, tensor

    def _behind(self, node: fx.Node) -> None:
        """What happens to tokens behind a node that was just copied."""
        if node in self.schedule:
            self._reduce(node, *self.schedule[node])

    # --- copying under versions ---------------------------------------------------------------

    def _version(self, node: fx.Node) -> int:
        return self.version_of.get(node, 0)

    def _visit(self, node: fx.Node) -> None:
        if node in self.rewriter.map:
            return  # part of a mask that was needed before its turn
        tokens = [n for n in node.all_input_nodes if self.sites.carries_tokens(n)]
        version = max((self._version(n) for n in tokens), default=0)
        if node.op == "placeholder" or version == 0:
            if node.target is SDPA and self.versions:
                self.masks[node] = self._plain_mask(node)
            self.rewriter.copy(node)
            return
        self.rewriter.at(node)
        if node in self.sites.late:
            self.rewriter.copy(node, {n: self._dense(n) for n in tokens})
            return
        replace = {n: self._follow(n, version, node) for n in tokens if self._version(n) != version}
        if node.target is SDPA:
            self._attend(node, replace, version)
        elif self.versions[version].size is not None and self.sites.pools(node):
            self._pool(node, version)
        else:
            self.rewriter.copy(
                node, replace, self.lengths.arguments(node, self.versions[version].count, replace)
            )
        if node in self.sites.shares:
            self._share(node, version)
        if self.sites.carries_tokens(node):
            self.version_of[node] = version

    def _follow(self, node: fx.Node, version: int, user: fx.Node) -> fx.Node:
        """Side information at the tokens of ``version``."""
        if node in self.stream:
            raise RefusedError(
                f"{self.name}: {user.name} ({module_path(user) or user.target}) joins tokens from before and after a"
                f" reduction ({node.name}); choose sites on one side of it with layers=..."
            )
        rank = (
            user.meta["val"].dim()
            if isinstance(user.meta["val"], torch.Tensor)
            else node.meta["val"].dim()
        )
        current = self.versions[version]
        key = (node, rank)
        if key not in current.followers:
            axes = self.sites.token_axes(node)
            current.followers[key] = follow.follow(
                self.rewriter,
                self.rewriter.map[node],
                axes,
                rank,
                self._positions(version),
                self._batched(node),
            )
        return current.followers[key]

    def _batched(self, node: fx.Node) -> bool:
        """Whether a tensor has one row per item of the batch."""
        assert self.sites.root is not None
        batch = self.sites.axes.of(self.sites.root)[0]
        variables = self.sites.axes.of(node)
        return bool(variables) and variables[0] == batch

    def _positions(self, version: int) -> fx.Node:
        """``[B, N]`` int64: the original position that each token of a version stands for."""
        current = self.versions[version]
        if current.positions is None:
            assert current.step is not None
            kept = current.step.kept
            current.positions = (
                kept
                if current.parent == 0
                else self.rewriter.emit(
                    aten.gather.default, self._positions(current.parent), 1, kept
                )
            )
        return current.positions

    # --- attention and pooling ----------------------------------------------------------------

    def _plain_mask(self, node: fx.Node) -> fx.Node | None:
        mask = Attention(node).mask
        return self.rewriter.map[mask] if mask is not None else None

    def _attend(self, node: fx.Node, replace: dict[fx.Node, fx.Node], version: int) -> None:
        attention = Attention(node)
        mask = attention.mask
        new_mask = (replace.get(mask) or self.rewriter.map[mask]) if mask is not None else None
        keys = replace.get(attention.k) or self.rewriter.map[attention.k]
        size = self.versions[version].size
        if size is not None and self._version(attention.k) == version:
            if self.proportional:
                new_mask = add_log_size(self.rewriter, new_mask, size, keys)
            if self.step.empties:
                new_mask = hide_empty(self.rewriter, new_mask, size, keys)
        self.masks[node] = new_mask
        args = [
            replace.get(a) or self.rewriter.map[a] for a in node.args[:3] if isinstance(a, fx.Node)
        ]
        rest = list(node.args[4:])
        kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
        self.rewriter.call_like(node, (*args, new_mask, *rest), kwargs)

    def _pool(self, node: fx.Node, version: int) -> None:
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        size = self.versions[version].size
        assert size is not None
        self.rewriter.map[node] = weighted_mean(
            self.rewriter, self.rewriter.map[operand], size, *self.sites.pooling(node)
        )

    def _share(self, node: fx.Node, version: int) -> None:
        """Sequence pooling counts a token as often as its size."""
        size = self.versions[version].size
        if size is None:
            return
        ((axis, offset),) = self.sites.token_axes(node).items()
        self.rewriter.map[node] = self.rewriter.inline(
            lambda shares, size: size_weighted_shares(shares, size, axis, -offset),
            self.rewriter.map[node],
            size,
        )

    # --- reducing and restoring ---------------------------------------------------------------

    def _reduce(self, stream: fx.Node, site: Site, count: Count | None) -> None:
        version = self._version(stream)
        current = self.versions[version]
        x = self.rewriter.map[stream]
        limits = self.step.limits(self.sites.protected)
        self.rewriter.at(stream, site=site.layer, path=site.path)
        if count is None:
            return
        tokens = self.rewriter.size(x, TOKEN_AXIS)
        keep = count.emit(self.rewriter, tokens, limits)
        if keep == tokens:
            return
        result = self.step.emit(self._site_view(site, current, x, keep), keep, count.pruned)
        self.versions.append(
            Version(
                result.x, self.rewriter.size(result.x, TOKEN_AXIS), result.size, result, x, version
            )
        )
        self.version_of[stream] = len(self.versions) - 1
        self.rewriter.map[stream] = result.x
        self.ledger.append(
            LedgerEntry(
                site.path, site.layer, self.name, self.step.combine, _plain(tokens), _plain(keep),
                self.sites.protected, result.node.name, result.slot_output, result.kept_output,
            )
        )  # fmt: skip

    def _site_view(self, site: Site, current: Version, x: fx.Node, keep: Size) -> SiteView:
        attention, source = site.attention, site.attention.source
        if current.size is None:
            current.size = self._first_sizes(x)
        return SiteView(
            self.rewriter, x, self.rewriter.map[attention.q], self.rewriter.map[attention.k],
            self.rewriter.map[attention.v], source and self.rewriter.map[source],
            self.masks.get(attention.node), current.size, attention.scale, site.layer,
            self.sites.protected, self.sites.class_token, keep, self.stored.get(site.layer, {}),
        )  # fmt: skip

    @cached_property
    def _real(self) -> fx.Node | None:
        """``[B, N]`` float32 of the tokens that came in: 0 for padding; None where there is none."""
        padding = self.sites.padding
        if padding is None:
            return None
        for node in origin(self.program.graph, padding):
            self._visit(node)
        return validity(self.rewriter, self.rewriter.map[padding])

    def _first_sizes(self, x: fx.Node) -> fx.Node | None:
        if self._real is not None:
            return self._real
        sized = self.step.merges or self.step.empties
        return initial_sizes(self.rewriter, x) if sized else None

    def _since_the_first(self, version: int) -> list[Version]:
        """The reductions behind a version, in order."""
        chain: list[Version] = []
        while version:
            chain.append(self.versions[version])
            version = chain[-1].parent
        return chain[::-1]

    def _dense(self, node: fx.Node) -> fx.Node:
        """A node's value with every token in its place again."""
        if node in self.dense_map:
            return self.dense_map[node]
        version = self._version(node)
        if version == 0:
            return self.rewriter.map[node]
        self.rewriter.at(node)
        reduced = self.rewriter.map[node]
        if node in self.trunk or node in self.schedule:
            dense = restore.restore(
                self.rewriter, reduced, self._since_the_first(version), self.step.drops
            )
        else:
            operands = {
                n: self._dense(n) for n in node.all_input_nodes if self.sites.carries_tokens(n)
            }
            dense = self.rewriter.copy(node, operands)
            self.rewriter.map[node] = reduced
        self.dense_map[node] = dense
        return dense


def _plain(size: fx.Node | int) -> int | str:
    return size if isinstance(size, int) else str(size.meta["val"])
