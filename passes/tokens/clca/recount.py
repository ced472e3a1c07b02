"""Copies a reduced Program with other numbers of tokens between its reductions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.export import ExportedProgram

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.sites import TOKEN_AXIS, Sites
from thresher.compiler.errors import RefusedError
from thresher.compiler.program import Program, Refusal, module_path
from thresher.compiler.surgery import Rewriter
from thresher.passes.tokens.clca.anatomy import Anatomy, Step
from thresher.passes.tokens.lengths import Lengths
from thresher.passes.tokens.sizes import initial_sizes


@dataclass(frozen=True)
class Version:
    """Tokens of one number: those that run between two places where the number changes."""

    segment: Sites
    tokens: int


class Unfit(RefusedError):
    """A node that other numbers of tokens do not suit."""

    def __init__(self, node: fx.Node, why: str) -> None:
        place = module_path(node)
        self.refusal = Refusal(node.name, f"{node.target} {f'in {place} ' if place else ''}{why}")
        super().__init__(f"{node.name}: {self.refusal.reason}")


class Recount:
    """The copy; what is done at reductions and between blocks is up to subclasses.

    Raises:
        Unfit: something has a length that does not follow, or goes with tokens of another number.
    """

    def __init__(self, program: Program, anatomy: Anatomy, made_by: str) -> None:
        self.program, self.anatomy, self.made_by = program, anatomy, made_by
        self.rewriter = Rewriter(program, made_by)
        self.constants: dict[str, torch.Tensor] = {}
        self.version_of: dict[fx.Node, Version] = {}
        self.starts = {node: block for block, node in enumerate(anatomy.starts)}

    def run(self) -> ExportedProgram:
        """The copy as an ExportedProgram."""
        first_input = next(iter(self.program.input_nodes()))
        for node in self.program.graph.nodes:
            if node.op == "output":
                continue
            if node is first_input:
                self._store()
            self._visit(node)
        return self.rewriter.finish(self._outputs(), self.constants)

    def _visit(self, node: fx.Node) -> None:
        step = self.anatomy.step_of.get(node)
        if step is None:
            self._copy(node)
            self._arrive(node)
            return
        self._inside(node, step)
        if node is step.last:
            self._leave(step)
            self._arrive(step.stream)

    def _arrive(self, stream: fx.Node) -> None:
        """The stream stands before a block, if it does."""
        if stream in self.starts:
            if stream not in self.version_of:
                self._set(stream, stream, self.anatomy.whole)
            self._between(stream, self.starts[stream])

    # --- what subclasses say ------------------------------------------------------------------

    def _store(self) -> None:
        """Placeholders of constants, before the user's inputs."""

    def _inside(self, node: fx.Node, step: Step) -> None:
        """A node of a reduction."""
        raise NotImplementedError

    def _leave(self, step: Step) -> None:
        """All nodes of a reduction were visited."""
        raise NotImplementedError

    def _between(self, stream: fx.Node, block: int) -> None:
        """The stream that a block reads was copied."""

    def _outputs(self) -> list[fx.Node]:
        return [self.rewriter.map[node] for node in self.program.output_nodes()]

    # --- copying ------------------------------------------------------------------------------

    def _set(self, node: fx.Node, stream: fx.Node, tokens: int) -> None:
        """From here on, a node holds so many of the tokens of ``stream``'s segment."""
        self.version_of[node] = Version(self.anatomy.segment(stream), tokens)

    def _copy(self, node: fx.Node) -> None:
        carrying = [n for n in node.all_input_nodes if self.anatomy.carries_tokens(n)]
        found = [self.version_of[n] for n in carrying if n in self.version_of]
        if not found:
            self.rewriter.copy(node)
            return
        version = found[-1]
        self._demand(node, carrying, version)
        self._recounted(node, version)
        if self.anatomy.carries_tokens(node):
            self.version_of[node] = version
            self._check(node, version)

    def _demand(self, node: fx.Node, carrying: list[fx.Node], version: Version) -> None:
        """Everything that goes into a node is of one number of tokens."""
        for operand in carrying:
            given = self.version_of.get(operand)
            if given is None or given.tokens != version.tokens:
                raise Unfit(
                    node,
                    f"reads {operand.name}, which has an entry for each token (a position, a mask): one that is"
                    " appended has none",
                )

    def _recounted(self, node: fx.Node, version: Version) -> None:
        lengths = Lengths(self.rewriter, version.segment)
        try:
            self.rewriter.copy(node, args=lengths.arguments(node, version.tokens, {}))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise Unfit(node, f"cannot take {version.tokens} tokens: {reason}") from error

    def _check(self, node: fx.Node, version: Version) -> None:
        """Lengths are as they have to be: another one where the tokens are, and nowhere else."""
        before, after = node.meta["val"], self.rewriter.map[node].meta["val"]
        if not isinstance(before, torch.Tensor):
            return
        tokens, axes = version.segment.token_axes(node), version.segment.axes
        for axis, (old, new) in enumerate(zip(before.shape, after.shape, strict=True)):
            parts = axes.variables.factors(axes.of(node)[axis]) or ()
            merged = any(part in version.segment.offsets for part in parts)
            wanted = version.tokens + tokens[axis] if axis in tokens else old
            if not merged and isinstance(old, int) and new != wanted:
                raise Unfit(
                    node,
                    f"has {new} entries where {wanted} are wanted; what it computes from the number of tokens is"
                    " not known",
                )


class Dense(Recount):
    """The copy in which no token leaves: the model that was reduced."""

    def _inside(self, node: fx.Node, step: Step) -> None:
        pass

    def _leave(self, step: Step) -> None:
        whole, x = self.anatomy.whole, self.rewriter.map[step.before]
        self.rewriter.at(step.stream)
        self.rewriter.map[step.stream] = x
        self._set(step.stream, step.stream, whole)
        for size in step.sizes:
            self.rewriter.map[size] = initial_sizes(self.rewriter, x)
            self._set(size, step.stream, whole)


def dense(program: Program, anatomy: Anatomy, made_by: str) -> Program:
    """A reduced Program without its reductions; raises as :class:`Recount`."""
    exported = Dense(program, anatomy, made_by).run()
    return replace(program, exported=exported, ledger=())


def length(node: fx.Node) -> int:
    """How many tokens a stream ``[B, N, C]`` of the new graph has."""
    return int(node.meta["val"].shape[TOKEN_AXIS])
