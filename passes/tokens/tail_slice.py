"""Tail slice: the first of a model's ordered latent tokens stay, its tail is never computed."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx
from torch.export import ExportedProgram

from thresher.compiler.analysis.axes import tensor_operands
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.latents import Latents, find_latents, objections
from thresher.compiler.analysis.linears import stored_values, stored_weights
from thresher.compiler.contract import Context, Options, Pass, PassResult
from thresher.compiler.errors import RefusedError, UsageError, nearest
from thresher.compiler.program import Program, Refusal, module_path
from thresher.compiler.surgery import Rewriter
from thresher.passes.tokens.lengths import Lengths

aten = torch.ops.aten
NONE_FOUND = (
    "no latent tokens were found: learned rows that are appended to a sequence, or the queries of a"
    " cross-attention"
)


class TailSliceOptions(Options):
    """How many latent tokens stay, and of which group."""

    tokens: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)],
        Field(description="latent tokens to keep, from the first on: a number, or a share of them"),
    ] = 0.5
    latents: Annotated[
        str | None,
        Field(description="name of the learned tensor that holds them, where there are several groups"),
    ] = None  # fmt: skip


class TailSlice(Pass[TailSliceOptions]):
    """Keep the first m of K ordered latent tokens: the model with its learned rows sliced.

    Hu et al., "Matryoshka Query Transformer", NeurIPS 2024 (queries of a resampler); Miwa et al.,
    "One-D-Piece", 2025 (tail drop in a 1-D image tokenizer).  The result is what the model
    computes with ``latents[:m]`` and the positions that belong to them.  That these are a code by themselves
    comes from training with nested latents, which a graph does not show.
    """

    name = "tail-slice"
    summary = "keep the first of a model's ordered latent tokens (1-D image tokenizers, MQT)"
    Options = TailSliceOptions

    @property
    def keeps_outputs(self) -> bool:
        return False

    def run(self, program: Program, context: Context) -> PassResult:
        groups = find_latents(program)
        if not groups:
            return PassResult(program, 0, 0, (Refusal("(graph)", NONE_FOUND),))
        chosen, refused = self._chosen(program, groups)
        if chosen is None:
            return PassResult(program, len(groups), 0, tuple(refused))
        keep = self._count(chosen)
        refused += objections(program, chosen, keep)
        if refused or keep == chosen.count:
            return PassResult(program, len(groups), 0, tuple(refused))
        exported = _Slicing(program, chosen, keep, self.name).run()
        dense, macs = total_macs(program.graph), total_macs(exported.graph)
        return PassResult(
            dataclasses.replace(program, exported=exported), len(groups), 1, (),
            {
                "latents": {chosen.names[0]: [chosen.count, keep]},
                "dense_macs": dense,
                "macs": macs,
                "ideal": dense / macs,
                "note": f"the first {keep} of {chosen.count} latents of {chosen.names[0]} stay, which are"
                " a code by themselves only where training made them one (nested latents)",
            },
        )  # fmt: skip

    def _chosen(
        self, program: Program, groups: list[Latents]
    ) -> tuple[Latents | None, list[Refusal]]:
        """The group that is meant, or why there is none.

        Raises:
            UsageError: no group has the name, or none was named and several could be sliced.
        """
        wanted = self.options.latents
        if wanted is not None:
            named = {name: group for group in groups for name in group.names}
            if wanted not in named:
                raise UsageError(
                    f"latents={wanted} does not exist in this model{nearest(wanted, named)}: its latents"
                    f" are {', '.join(named)}"
                )
            return named[wanted], []
        against = [(group, objections(program, group, group.count)) for group in groups]
        free = [group for group, refused in against if not refused]
        if len(free) > 1:
            raise UsageError(
                f"the model has {len(free)} groups of latents, so say which: latents="
                + " or latents=".join(group.names[0] for group in free)
            )
        return (free[0], []) if free else (None, [r for _, refused in against for r in refused])

    def _count(self, latents: Latents) -> int:
        wanted, most = self.options.tokens, latents.count
        if isinstance(wanted, float):
            return math.ceil(round(wanted * most, 6))
        if wanted > most:
            raise UsageError(
                f"tokens={wanted} is more than the {most} latents of {latents.names[0]}: give {most - 1}"
                " or less"
            )
        return wanted


class _Slicing:
    """Every axis that ends in latents is cut where it begins, at a stored tensor or one made from
    sizes; behind that its length follows.
    """

    def __init__(self, program: Program, latents: Latents, keep: int, made_by: str) -> None:
        self.program, self.sites = program, latents.sites
        self.keep, self.gone = keep, latents.count - keep
        self.rewriter = Rewriter(program, made_by)
        self.lengths = Lengths(self.rewriter, latents.sites)
        self.names, self.values = stored_weights(program), stored_values(program)
        self.made_by = made_by

    def run(self) -> ExportedProgram:
        weights: dict[str, Tensor] = {}
        for node in self.program.graph.nodes:
            if node.op == "output":
                continue
            if node in self.values and self.sites.carries_tokens(node):
                weights[self.names[node]] = self._stored(node)
                self.rewriter.weight(node, weights[self.names[node]])
            elif node.op == "placeholder":
                self.rewriter.copy(node)
            else:
                self._call(node)
            self._check(node)
        outputs = [self.rewriter.map[node] for node in self.program.output_nodes()]
        return self.rewriter.finish(outputs, weights=weights)

    def _stored(self, node: fx.Node) -> Tensor:
        """A stored tensor without the rows of the latents that go."""
        value = self.values[node]
        for axis in self.sites.token_axes(node):
            value = value.narrow(axis, 0, value.shape[axis] - self.gone)
        exported = self.program.exported
        was = {**exported.constants, **exported.state_dict}[self.names[node]]
        whole = value.clone(memory_format=torch.contiguous_format)
        return torch.nn.Parameter(whole, False) if isinstance(was, torch.nn.Parameter) else whole

    def _call(self, node: fx.Node) -> None:
        new = self.rewriter.copy(node, args=self.lengths.arguments(node, self.keep, {}))
        if any(self.sites.carries_tokens(operand) for operand in tensor_operands(node)):
            return
        self.rewriter.at(node)
        for axis, offset in self.sites.token_axes(node).items():
            if new.meta["val"].shape[axis] != self.keep + offset:
                new = self.rewriter.emit(aten.slice.Tensor, new, axis, 0, self.keep + offset)
        self.rewriter.map[node] = new

    def _check(self, node: fx.Node) -> None:
        """Lengths are as they have to be: shorter where latents are, and nowhere else."""
        before, after = node.meta.get("val"), self.rewriter.map[node].meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return
        tokens = self.sites.token_axes(node)
        factors = self.sites.axes.variables.factors
        for axis, (old, new) in enumerate(zip(before.shape, after.shape, strict=True)):
            parts = factors(self.sites.axes.of(node)[axis]) or ()
            if any(part in self.sites.offsets for part in parts) or not isinstance(old, int):
                continue
            if new != old - self.gone * (axis in tokens):
                raise RefusedError(
                    f"{self.made_by}: {node.name} ({module_path(node) or node.target}) has {new} entries"
                    f" where fewer latents should leave {old - self.gone * (axis in tokens)}; what it"
                    " computes from their number is not known"
                )
