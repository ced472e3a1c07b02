"""Token skipping with a fixed capacity: the tokens that a block would change least pass it by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.branches import blocks, find_branches, halves
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.contract import Calibration, Context, Options, Pass, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.program import Program, Refusal
from thresher.passes.depth.bypass import Bypass
from thresher.passes.depth.probe import fitted
from thresher.passes.depth.spans import Span, find_spans
from thresher.passes.depth.train import Skipping, trained
from thresher.passes.learning import calibration, saved
from thresher.passes.learning.options import DistilledBy, Patience, Rate
from thresher.passes.options import Flops
from thresher.passes.tokens import budget
from thresher.passes.tokens.budget import Count, Limits
from thresher.passes.tokens.options import Multiple

LEAST_ITEMS = 8  # of the data
DEFAULT_CAPACITY = 0.5
Routers: TypeAlias = Mapping[str, Tensor]  # by part [C + 1], weights and bias
Find: TypeAlias = Callable[[Skipping, Context], tuple[Routers, dict[str, Any]]]


class SkipOptions(Options):
    """Where tokens skip and how many run: at most one of ``capacity`` and ``flops``."""

    capacity: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of the tokens that run through a block, prefix tokens always do"),
    ] = None  # fmt: skip
    flops: Flops = None
    layers: Annotated[
        tuple[int, ...] | None,
        Field(description="blocks that tokens may skip, from 0; by default every second one, 1, 3, ..."),
    ] = None  # fmt: skip
    part: Annotated[
        Literal["block", "ffn"],
        Field(description="skip whole blocks, or feed-forward halves only: then all tokens are attended to"),
    ] = "block"  # fmt: skip
    router: Annotated[
        Literal["probe", "trained", "random"],
        Field(description="who runs: by a linear probe of the update's length, by a router that is trained from"
            " there, or, as a control, in a fixed random order"),
    ] = "probe"  # fmt: skip
    multiple: Multiple = 1
    items: Annotated[int, Field(ge=LEAST_ITEMS, description="items of the data to fit on")] = 256
    steps: Annotated[int, Field(ge=0, description="most steps of training")] = 200
    rate: Rate = 1e-2
    loss: DistilledBy = "auto"
    patience: Patience = 100
    calibration: Annotated[
        Path | None, Field(description="what was fitted or trained before, instead of data")
    ] = None

    @model_validator(mode="after")
    def _one_budget(self) -> SkipOptions:
        if self.capacity is not None and self.flops is not None:
            raise ValueError("give one budget only, not capacity and flops")
        return self


class SkipTokens(Pass[SkipOptions]):
    """A fixed number of tokens runs through a block; the others pass it by on the residual stream.

    Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language
    models", 2024, which trains its routers with the model.  Here the model is frozen: a router is the
    least-squares fit, on data without labels, of the length of what a block adds to a token, and may
    be trained from there.
    Prefix tokens always run, padding runs last, and every token is back in its place behind the block.
    """

    name = "skip-tokens"
    summary = "let the tokens that a block would change least pass it by"
    Options = SkipOptions
    needs_data: ClassVar[bool] = True
    trains = True
    chooses_tokens = True

    @property
    def decided(self) -> bool:
        return self.options.router == "random" or super().decided

    def match(self, program: Program, context: Context) -> PassResult:
        """What :meth:`run` would count and what that would cost; nothing is fitted or trained."""
        result, _ = self._done(program, context, _untrained)
        return dataclasses.replace(result, program=program)

    def run(self, program: Program, context: Context) -> PassResult:
        result, routers = self._done(program, context, self._routers)
        return result if not routers else self._kept(result, program, routers)

    def _done(self, program: Program, context: Context, find: Find) -> tuple[PassResult, Routers]:
        """The result with routers that ``find`` makes, and them."""
        sites = find_sites(program)
        spans, refused = self._spans(program, sites)
        matched = len(spans) + len(refused)
        if not spans:
            return PassResult(program, matched, 0, tuple(refused)), {}
        count = self._count(program, sites, spans)
        tokens = hint_of(sites.tokens)
        kept = count.of(tokens, Limits(sites.protected))
        if kept == tokens:
            return PassResult(program, matched, 0, tuple(refused)), {}
        random = self.options.router == "random"
        routers, told = (
            ({}, {}) if random else find(Skipping(program, sites, spans, count), context)
        )
        bypass = Bypass(program, sites, spans, count, routers, self.name, context.seed)
        exported, _ = bypass.run()
        result = dataclasses.replace(program, exported=exported)
        dense, macs = total_macs(program.graph), total_macs(result.graph)
        details = {
            "running": [tokens, kept],
            "blocks": [span.part.name for span in spans],
            **told,
            "dense_macs": dense,
            "macs": macs,
            "ideal": dense / macs,
        }
        return PassResult(result, matched, len(spans), tuple(refused), details), routers

    def _kept(self, done: PassResult, program: Program, routers: Routers) -> PassResult:
        """The result with what makes the same graph without data."""
        file = f"{saved.numbered(program, self.name)}.safetensors"
        tensors = {f"router.{part}": router for part, router in routers.items()}
        return dataclasses.replace(
            done,
            options=self.options.model_copy(update={"calibration": Path(file)}),
            calibration=Calibration(file, weights_digest(program), tensors, self._facts),
        )

    @property
    def _facts(self) -> dict[str, str]:
        """What kept routers answer to; they serve every capacity, as they are only an order."""
        return {"router": self.options.router}

    def _spans(self, program: Program, sites: Sites) -> tuple[list[Span], list[Refusal]]:
        if any(record.name == self.name and record.applied for record in program.history):
            again = "tokens skip blocks already: start from the original model"
            return [], [Refusal("(graph)", again)]
        branches = find_branches(program)
        parts = blocks(branches)
        if self.options.part == "ffn":
            parts = [half for half in halves(branches) if half.branches[0].kind == "ffn"]
        if not parts or sites.root is None:
            none = Refusal("(graph)", "no block was found that tokens could skip")
            return [], sites.refusals or [none]
        layers = self.options.layers
        depth = branches[-1].layer + 1
        wrong = next((layer for layer in layers or () if not 0 <= layer < depth), None)
        if wrong is not None:
            raise UsageError(
                f"layers={wrong} does not exist: the model has {depth} blocks, 0 to {depth - 1}"
            )
        chosen = range(depth)[1::2] if layers is None else layers
        return find_spans(program, sites, [p for p in parts if p.branches[0].layer in chosen])

    def _count(self, program: Program, sites: Sites, spans: Sequence[Span]) -> Count:
        """What runs through a span."""
        if self.options.flops is None:
            share = self.options.capacity or DEFAULT_CAPACITY
            return budget.share(share).rounded(self.options.multiple)
        tokens, dense = hint_of(sites.tokens), total_macs(program.graph)
        outside = dense - sum(span.macs(sites, 1.0) for span in spans)
        width = int(spans[0].before.meta["val"].shape[-1])
        router = tokens * width * (self.options.router != "random")
        limits, spent = Limits(sites.protected), 1.0
        for gone in range(tokens - sites.protected):
            count = Count("remove", gone, multiple=self.options.multiple)
            kept = count.of(tokens, limits)
            inserted = (router + (tokens - kept) * width) * len(spans) if gone else 0
            inside = sum(span.macs(sites, kept / tokens) for span in spans)
            spent = (outside + inside + inserted) / dense
            if spent <= self.options.flops:
                share = (tokens - gone - sites.protected) / (tokens - sites.protected)
                fixed = isinstance(sites.tokens, int)
                return count if fixed else budget.share(share).rounded(self.options.multiple)
        raise VerdictError(
            f"the budget flops={self.options.flops:g} cannot be met: with one token running through"
            f" {len(spans)} blocks {spent:.3f} of the work remains; name more blocks (layers=...) or ask"
            " for less"
        )

    def _routers(self, skipping: Skipping, context: Context) -> tuple[Routers, dict[str, Any]]:
        """Fitted, trained or read, and what is told of that."""
        program, parts = skipping.program, [span.part for span in skipping.spans]
        if self.options.calibration is not None:
            names = [part.name for part in parts]
            path, digest = self.options.calibration, weights_digest(program)
            found = saved.read(path, digest, self.name, names, self._facts)
            note = {"note": f"routers taken from {path.name}"}
            return {name: found[f"router.{name}"] for name in names}, note
        assert context.data is not None
        if self.options.router == "trained":
            return trained(skipping, self.options, context, self.name)
        items = calibration.chosen_items(context.data, self.options.items, LEAST_ITEMS)
        probes = fitted(program, parts, context, items, self.name)
        routers = {part: probe.solve() for part, probe in probes.items()}
        explained = {part: probe.explained(routers[part]) for part, probe in probes.items()}
        return routers, {"explained": explained}


def _untrained(skipping: Skipping, context: Context) -> tuple[Routers, dict[str, Any]]:
    """Routers of which only the size is right."""
    width = {s.part.name: int(s.before.meta["val"].shape[-1]) for s in skipping.spans}
    return {part: torch.zeros(channels + 1) for part, channels in width.items()}, {}
