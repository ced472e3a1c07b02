"""Depth pruning: the blocks that change their tokens least are left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch.export import ExportedProgram

from thresher.compiler.analysis.branches import (
    Branch,
    Part,
    blocks,
    find_branches,
    halves,
    live_macs,
    live_nodes,
)
from thresher.compiler.contract import Context, Options, Pass, PassResult
from thresher.compiler.errors import UsageError, VerdictError, nearest
from thresher.compiler.program import Program, Refusal
from thresher.compiler.surgery import Rewriter
from thresher.passes.depth.influence import influences
from thresher.passes.learning import calibration
from thresher.passes.options import Flops

LEAST_ITEMS = 8  # of the data
USUAL = 4  # without a budget, one of so many parts goes


class DropOptions(Options):
    """What may go, and how much of it: at most one of ``count`` and ``flops``."""

    count: Annotated[int | None, Field(ge=1, description="parts to leave out")] = None
    flops: Flops = None
    part: Annotated[
        Literal["block", "half"],
        Field(description="leave out whole blocks, or attention and feed-forward halves"),
    ] = "block"
    drop: Annotated[
        tuple[str, ...] | None,
        Field(description="the parts to leave out, such as 3, or 3.attention and 4.ffn; nothing is"
            " measured then"),
    ] = None  # fmt: skip
    items: Annotated[int, Field(ge=LEAST_ITEMS, description="items of the data to measure on")] = (
        256
    )

    @field_validator("drop", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        """Numbers of blocks are names."""
        listed = [value] if isinstance(value, (str, int)) else value
        if not isinstance(listed, (list, tuple)):
            return value
        return tuple(str(name) if type(name) is int else name for name in listed)

    @model_validator(mode="after")
    def _one_budget(self) -> DropOptions:
        if self.count is not None and self.flops is not None:
            raise ValueError("give one budget only, not count and flops")
        return self


class DropBlocks(Pass[DropOptions]):
    """Leave out the blocks, or halves of blocks, with the least influence; nothing is trained.

    ``out = skip + f(skip)`` becomes ``skip``.  Influence is measured once, on the model that came in.
    What else reads a dropped branch keeps its nodes: the keys that tokens merge by, a cache.
    """

    name = "drop-blocks"
    summary = "leave out the blocks that change their tokens least"
    Options = DropOptions
    needs_data: ClassVar[bool] = True

    @property
    def decided(self) -> bool:
        return self.options.drop is not None

    def run(self, program: Program, context: Context) -> PassResult:
        branches = find_branches(program)
        parts = (halves if self.options.part == "half" else blocks)(branches)
        why = self._objection(program, parts)
        if why is not None:
            return PassResult(program, len(parts), 0, (why,))
        if self.options.drop is not None:
            measured = dict[str, float]()
            gone = _named(blocks(branches) + halves(branches), self.options.drop)
        else:
            measured = self._measure(program, parts, context)
            gone = self._chosen(program, parts, measured)
        if not gone:
            return PassResult(program, len(parts), 0)
        removed = [branch for part in gone for branch in part.branches]
        result = dataclasses.replace(program, exported=_without(program, removed, self.name))
        return PassResult(
            result, len(parts), len(gone), (),
            _details(program, removed, gone, measured),
            self.options.model_copy(update={"drop": tuple(part.name for part in gone)}),
        )  # fmt: skip

    def _objection(self, program: Program, parts: Sequence[Part]) -> Refusal | None:
        if any(record.name == self.name and record.applied for record in program.history):
            return Refusal("(graph)", "blocks were left out already: start from the original model")
        if not parts:
            reason = "no residual branch was found (x + f(x) with a linear or attention in f)"
            return Refusal("(graph)", reason)
        return None

    def _measure(
        self, program: Program, parts: Sequence[Part], context: Context
    ) -> dict[str, float]:
        assert context.data is not None
        items = calibration.chosen_items(context.data, self.options.items, LEAST_ITEMS)
        found = influences(program, parts, context, items, self.name)
        return {part.name: value for part, value in zip(parts, found, strict=True)}

    def _chosen(
        self, program: Program, parts: Sequence[Part], measured: Mapping[str, float]
    ) -> list[Part]:
        """The parts of least influence, as many as the budget asks for, in the order of the model."""
        ranked = sorted(parts, key=lambda part: measured[part.name])
        if self.options.flops is not None:
            chosen = _within(program, ranked, self.options.flops)
        else:
            count = self.options.count or max(1, len(parts) // USUAL)
            if count >= len(parts):
                raise UsageError(
                    f"count={count} leaves nothing of the model, which has {len(parts)} parts that can"
                    f" go: give {len(parts) - 1} or less"
                )
            chosen = ranked[:count]
        return [part for part in parts if part in chosen]


def _within(program: Program, ranked: Sequence[Part], budget: float) -> list[Part]:
    """As few of the ranked parts as bring the work down to a share of it.

    Raises:
        VerdictError: more is left when all but one are gone.
    """
    dense, share = live_macs(program), 1.0
    for count in range(len(ranked)):
        share = live_macs(program, [b for part in ranked[:count] for b in part.branches]) / dense
        if share <= budget:
            return list(ranked[:count])
    raise VerdictError(
        f"the budget flops={budget:g} cannot be met: with all but one of {len(ranked)} parts left out"
        f" {share:.3f} of the work remains; ask for less"
    )


def _named(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    by_name = {part.name: part for part in parts}
    wrong = next((name for name in names if name not in by_name), None)
    if wrong is not None:
        raise UsageError(
            f"drop={wrong} does not exist in this model{nearest(wrong, by_name)}: its parts are"
            f" {', '.join(by_name)}"
        )
    return [by_name[name] for name in dict.fromkeys(names)]


def _without(program: Program, gone: Sequence[Branch], made_by: str) -> ExportedProgram:
    """The graph with the stream passing some branches by; weights that nobody reads leave."""
    rewriter = Rewriter(program, made_by)
    instead = {branch.out: branch.skip for branch in gone}
    before, live = live_nodes(program), live_nodes(program, gone)
    for node in program.graph.nodes:
        if node in instead:
            rewriter.map[node] = rewriter.map[instead[node]]
        elif node.op == "placeholder" or node in live:
            rewriter.copy(node)
    unread = frozenset(
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder" and node in before and node not in live
    )
    inputs = {node.name for node in program.input_nodes()}
    return rewriter.finish(
        [rewriter.map[node] for node in program.output_nodes()], dropped=unread - inputs
    )


def _details(
    program: Program, removed: Sequence[Branch], gone: Sequence[Part], measured: Mapping[str, float]
) -> dict[str, Any]:
    dense, macs = live_macs(program), live_macs(program, removed)
    names = ", ".join(part.name for part in gone)
    return {
        "influence": dict(measured),
        "dropped": [part.name for part in gone],
        "dense_macs": dense,
        "macs": macs,
        "ideal": dense / macs if macs else 1.0,
        "note": f"left out {names} of the blocks, which are counted from 0",
    }
