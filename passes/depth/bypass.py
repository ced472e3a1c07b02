"""Parts that only the highest-scored tokens run through; the others pass by on the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.sites import TOKEN_AXIS, Sites
from thresher.compiler.program import LedgerEntry, Program, provenance
from thresher.passes.depth.spans import Span
from thresher.passes.tokens.budget import Count, Limits
from thresher.passes.tokens.reduce import Reduction, Version
from thresher.passes.tokens.score import Norm, layer_seed, random_score
from thresher.passes.tokens.step import LOWEST, Keep, StepResult

SLOT, KEPT = 1, 2  # outputs of keep_tokens
KEEP, RESTORE = torch.ops.thresher.keep_tokens.default, torch.ops.thresher.restore_tokens.default


def detours(program: Program) -> tuple[LedgerEntry, ...]:
    """What a ledger would say of tokens that pass a span by, which is none: they all come back.

    Such tokens leave by ``keep_tokens`` and come back beside the very tensor that they left.
    """
    listed = {entry.node for entry in program.ledger}
    return tuple(
        _entry(node)
        for node in program.graph.nodes
        if node.target is KEEP and node.name not in listed and _come_back(node)
    )


def _come_back(leave: fx.Node) -> bool:
    slots = [n for n in leave.users if n.args[1] == SLOT]
    users = [user for slot in slots for user in slot.users]
    return any(user.target is RESTORE and user.args[2] is leave.args[0] for user in users)


def _entry(leave: fx.Node) -> LedgerEntry:
    note = provenance(leave)
    tokens, left = (str(leave.meta["val"][output].shape[1]) for output in (SLOT, KEPT))
    protected = leave.args[3]
    assert isinstance(protected, int)
    return LedgerEntry(
        note.get("path", ""), note.get("site", 0), note.get("pass", ""), "skip", tokens, left,
        protected, leave.name, SLOT, KEPT,
    )  # fmt: skip


class Bypass(Reduction):
    """Tokens leave before a span and are back in their places behind it, in a version of their own.

    Args:
        count: of the tokens that run through a span; the prefix always does.
        probes: by part ``[C + 1]``, weights and bias of its router; without one a fixed random order.
    """

    def __init__(
        self,
        program: Program,
        sites: Sites,
        spans: Sequence[Span],
        count: Count,
        probes: Mapping[str, Tensor],
        name: str,
        seed: int,
    ) -> None:
        schedule = (None,) * len(sites.sites)  # nothing leaves for good
        super().__init__(program, sites, Keep(Norm()), schedule, name, proportional=False)
        self.count, self.seed = count, seed
        self.entries = {span.before: span for span in spans}
        self.exits = {span.behind: span for span in spans}
        self.probes = {key: self._constants(key, probe) for key, probe in probes.items()}
        self.made: dict[str, fx.Node] = {}
        self.inputs = set(program.input_nodes())

    def _constants(self, part: str, probe: Tensor) -> tuple[str, str]:
        names = tuple(f"router_{what}_{part.replace('.', '_')}" for what in ("weight", "bias"))
        self.constants |= {names[0]: probe[None, :-1].clone(), names[1]: probe[-1:].clone()}
        return names[0], names[1]

    def _visit(self, node: fx.Node) -> None:
        if node in self.inputs and not self.made:
            self.made = {key: self.rewriter.constant(key, t) for key, t in self.constants.items()}
        super()._visit(node)

    def _behind(self, node: fx.Node) -> None:
        if node in self.exits:
            self._come_back(self.exits[node])
        if node in self.entries:
            self._leave(self.entries[node])

    def _leave(self, span: Span) -> None:
        x = self.rewriter.map[span.before]
        self.rewriter.at(span.before, site=span.layer, path=span.part.path)
        tokens, protected = self.rewriter.size(x, TOKEN_AXIS), self.sites.protected
        keep = self.count.emit(self.rewriter, tokens, Limits(protected))
        node = self.rewriter.emit(KEEP, x, self._score(span, x), keep, protected, False)
        y, slot, kept = self.rewriter.outputs(node)
        step = StepResult(node, y, None, slot, kept, SLOT, KEPT)
        left = self.rewriter.size(y, TOKEN_AXIS)
        self.versions.append(Version(y, left, None, step, before=x))
        self.rewriter.map[span.before] = y
        self.version_of[span.before] = len(self.versions) - 1

    def _come_back(self, span: Span) -> None:
        version = self.versions[self._version(span.behind)]
        assert version.step is not None
        assert version.before is not None
        self.rewriter.at(span.behind, site=span.layer, path=span.part.path)
        self.rewriter.map[span.behind] = self.rewriter.emit(
            RESTORE,
            self.rewriter.map[span.behind], version.step.slot, version.before,
        )  # fmt: skip
        self.rewriter.map[span.before] = version.before
        self.version_of[span.before] = self.version_of[span.behind] = version.parent

    def _score(self, span: Span, x: fx.Node) -> fx.Node:
        """``[B, N]`` float32, padding last."""
        if span.part.name in self.probes:
            weight, bias = (self.made[name] for name in self.probes[span.part.name])
            score = self.rewriter.inline(
                lambda x, w, b: F.linear(x.float(), w, b).squeeze(-1), x, weight, bias
            )
        else:
            seed = layer_seed(self.seed, span.layer)
            score = self.rewriter.inline(
                lambda x: random_score(x.shape[1], seed, x.device).expand(x.shape[0], -1), x
            )
        if self._real is None:
            return score
        return self.rewriter.inline(
            lambda s, n: torch.where(n > 0, s, torch.full_like(s, LOWEST)), score, self._real
        )
