"""Puts cache and head into a reduced Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from thresher.compiler.analysis.sites import TOKEN_AXIS
from thresher.compiler.program import Program
from thresher.passes.tokens.clca.anatomy import Anatomy, Step
from thresher.passes.tokens.clca.head import PER_CHANNEL
from thresher.passes.tokens.clca.recount import Recount, length
from thresher.passes.tokens.sizes import size_weighted

aten = torch.ops.aten


class Insertion(Recount):
    """Carriers of each block are kept and appended where tokens left, and class tokens are read out together.

    Args:
        weights: the tensors of :func:`~.head.folded`, and ``token`` ``[C]`` where there is a cache.

    Attributes:
        stored: name of the placeholder of each of ``weights``.
        appended: behind which block how many tokens are appended; -1 is before the first.
        stacked: name of the node that holds the class tokens ``[B, C, S]``.
    """

    def __init__(
        self, program: Program, anatomy: Anatomy, made_by: str, weights: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(program, anatomy, made_by)
        self.weights = weights
        self.stored: dict[str, fx.Node] = {}
        self.appended: dict[int, int] = {}
        self.stacked = ""
        self._sizes: Sequence[fx.Node] = ()
        self._cache: list[fx.Node] = []
        self._own, self._classes = anatomy.whole, list[fx.Node]()
        before_last = len(anatomy.starts) - 2
        self._recovers = (anatomy.reduced | {before_last}) - {before_last + 1}

    def inserted(self) -> Program:
        """The Program with cache and head."""
        exported = self.run()
        steps = {entry.node for entry in self.program.ledger}
        came = {n.name: self._came(n) for n in self.rewriter.graph.nodes if n.name in steps}
        ledger = tuple(
            replace(
                entry, tokens_in=came[entry.node], appended=came[entry.node] - int(entry.tokens_in)
            )
            for entry in self.program.ledger
        )
        return replace(self.program, exported=exported, ledger=ledger)

    @staticmethod
    def _came(operation: fx.Node) -> int:
        before = operation.args[0]
        assert isinstance(before, fx.Node)
        return length(before)

    def _store(self) -> None:
        for name, tensor in self.weights.items():
            node = self.rewriter.constant(f"{self.made_by}_{name}", tensor)
            self.stored[name], self.constants[node.name] = node, tensor

    def _read(self, name: str, like: fx.Node) -> fx.Node:
        """One of the weights, in the type of the tokens."""
        stored, dtype = self.stored[name], like.meta["val"].dtype
        if stored.meta["val"].dtype == dtype:
            return stored
        return self.rewriter.emit(aten.to.dtype, stored, dtype)

    # --- reductions ---------------------------------------------------------------------------

    def _inside(self, node: fx.Node, step: Step) -> None:
        version = self.version_of[step.before]
        inside = set(step.nodes)
        beside = [
            n for n in node.all_input_nodes if n not in inside and self.anatomy.carries_tokens(n)
        ]
        self._demand(node, beside, version)
        self._recounted(node, version)

    def _leave(self, step: Step) -> None:
        for node in (step.stream, *step.sizes):
            self._set(node, step.stream, step.left)
        self._sizes = step.sizes

    # --- between blocks -----------------------------------------------------------------------

    def _between(self, stream: fx.Node, block: int) -> None:
        ended = block - 1
        self.rewriter.at(stream)
        if ended in self.anatomy.reduced:
            self._keep_class(stream)
        if "token" not in self.stored:
            return
        if block == 0:
            self._append(stream, [self._first(stream)], ended)
            return
        if ended in self._recovers:
            self._own = length(self.rewriter.map[stream])
            self._append(stream, self._cache, ended)
            self._cache = []
        if ended < max(self._recovers):
            self._cache += [self._mean(stream), self._trailing(stream)]

    def _first(self, stream: fx.Node) -> fx.Node:
        """The learned token for each item, ``[B, 1, C]``."""
        x = self.rewriter.map[stream]
        return self.rewriter.inline(
            lambda x, token: token.expand(x.shape[0], 1, -1), x, self._read("token", x)
        )

    def _mean(self, stream: fx.Node) -> fx.Node:
        """The mean of the model's own tokens ``[B, 1, C]``: those behind the class token that were not appended here.

        Places that a reduction left empty (size 0) do not count.
        """
        first, own = self.anatomy.class_token + 1, self._own
        x = self.rewriter.map[stream]
        if not self._sizes:
            return self.rewriter.inline(lambda x: x[:, first:own].mean(1, keepdim=True), x)
        return self.rewriter.inline(
            lambda x, size: size_weighted(x[:, first:own], size[:, first:own].clamp(max=1), 1, 0, True),
            x, self.rewriter.map[self._sizes[0]],
        )  # fmt: skip

    def _trailing(self, stream: fx.Node) -> fx.Node:
        """The last token ``[B, 1, C]``: the cache token as it is now, or what the reduction left last."""
        x = self.rewriter.map[stream]
        return self.rewriter.emit(aten.slice.Tensor, x, TOKEN_AXIS, length(x) - 1, length(x))

    def _append(self, stream: fx.Node, more: Sequence[fx.Node], ended: int) -> None:
        if not more:
            return
        count, x = len(more), self.rewriter.map[stream]
        self.rewriter.map[stream] = self.rewriter.emit(aten.cat.default, [x, *more], TOKEN_AXIS)
        tokens = length(x) + count
        self._set(stream, stream, tokens)
        for size in self._sizes:
            self.rewriter.map[size] = self.rewriter.inline(
                lambda s: torch.cat([s, s.new_ones((s.shape[0], count))], dim=1),
                self.rewriter.map[size],
            )
            self._set(size, stream, tokens)
        self.appended[ended] = count

    # --- reading out --------------------------------------------------------------------------

    def _keep_class(self, stream: fx.Node) -> None:
        x = self.rewriter.map[stream]
        self._classes.append(
            self.rewriter.emit(aten.select.int, x, TOKEN_AXIS, self.anatomy.class_token)
        )

    def _outputs(self) -> list[fx.Node]:
        (output,) = self.program.output_nodes()
        self.rewriter.at(output)
        self._keep_class(self.anatomy.last)
        stacked = self.rewriter.emit(aten.stack.default, self._classes, -1)
        self.stacked = stacked.name
        kernel, bias, read, read_bias = (
            self._read(name, stacked) for name in ("kernel", "bias", "read", "read_bias")
        )
        groups = int(kernel.meta["val"].shape[0]) // PER_CHANNEL
        mixed = self.rewriter.emit(
            aten.conv1d.default, stacked, kernel, bias, [1], [0], [1], groups
        )
        active = self.rewriter.emit(
            aten.gelu.default, self.rewriter.emit(aten.squeeze.dim, mixed, -1)
        )
        logits = self.rewriter.emit(aten.linear.default, active, read, read_bias)
        dtype = output.meta["val"].dtype
        if logits.meta["val"].dtype != dtype:
            logits = self.rewriter.emit(aten.to.dtype, logits, dtype)
        return [logits]
