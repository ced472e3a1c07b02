"""Token skipping with a fixed capacity: the tokens that a block would change least pass it by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.branches import blocks, find_branches, halves
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.sites import Sites, find_sites
from thresher.compiler.contract import Calibration, Context, Options, Pass, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.program import Program, Refusal
from thresher.passes.depth.bypass import Bypass
from thresher.passes.depth.probe import fitted
from thresher.passes.depth.spans import Span, find_spans
from thresher.passes.sparsity import calibration
from thresher.passes.tokens import budget
from thresher.passes.tokens.budget import Count, Limits

LEAST_ITEMS = 8  # of the data
DEFAULT_CAPACITY = 0.5


class SkipOptions(Options):
    """Where tokens skip and how many run: at most one of ``capacity`` and ``flops``."""

    capacity: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of the tokens that run through a block, prefix tokens always do"),
    ] = None  # fmt: skip
    flops: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of the multiply-accumulates to spend, of those that came in"),
    ] = None  # fmt: skip
    layers: Annotated[
        tuple[int, ...] | None,
        Field(description="blocks that tokens may skip, from 0; by default every second one, 1, 3, ..."),
    ] = None  # fmt: skip
    part: Annotated[
        Literal["block", "ffn"],
        Field(description="skip whole blocks, or feed-forward halves only: then all tokens are attended to"),
    ] = "block"  # fmt: skip
    router: Annotated[
        Literal["probe", "random"],
        Field(description="who runs: by a linear probe of the update's length, or, as a control, a fixed"
            " random order"),
    ] = "probe"  # fmt: skip
    multiple: Annotated[
        int,
        Field(ge=1, description="round the tokens that run up to a multiple, prefix included; 8 pays on GPUs"),
    ] = 1  # fmt: skip
    items: Annotated[int, Field(ge=LEAST_ITEMS, description="items of the data to fit on")] = 256
    calibration: Annotated[
        Path | None, Field(description="what was fitted before, instead of data")
    ] = None

    @model_validator(mode="after")
    def _one_budget(self) -> SkipOptions:
        if self.capacity is not None and self.flops is not None:
            raise ValueError("give one budget only, not capacity and flops")
        return self


class SkipTokens(Pass[SkipOptions]):
    """A fixed number of tokens runs through a block; the others pass it by on the residual stream.

    Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language
    models", 2024, which trains its routers with the model.  Here nothing is trained: a router is the
    least-squares fit, on data without labels, of the length of what a block adds to a token.
    Prefix tokens always run, padding runs last, and every token is back in its place behind the block.
    """

    name = "skip-tokens"
    summary = "let the tokens that a block would change least pass it by"
    Options = SkipOptions
    needs_data: ClassVar[bool] = True
    chooses_tokens = True

    def demand_data(self, context: Context) -> None:
        if self.options.router == "probe" and self.options.calibration is None:
            super().demand_data(context)

    def run(self, program: Program, context: Context) -> PassResult:
        sites = find_sites(program)
        spans, refused = self._spans(program, sites)
        matched = len(spans) + len(refused)
        if not spans:
            return PassResult(program, matched, 0, tuple(refused))
        count = self._count(program, sites, spans)
        tokens = hint_of(sites.tokens)
        kept = count.of(tokens, Limits(sites.protected))
        if kept == tokens:
            return PassResult(program, matched, 0, tuple(refused))
        probes, explained = self._probes(program, context, spans)
        bypass = Bypass(program, sites, spans, count, probes, self.name, context.seed)
        exported, _ = bypass.run()
        result = dataclasses.replace(program, exported=exported)
        dense, macs = total_macs(program.graph), total_macs(result.graph)
        details = {
            "running": [tokens, kept],
            "blocks": [span.part.name for span in spans],
            "explained": explained,
            "dense_macs": dense,
            "macs": macs,
            "ideal": dense / macs,
        }
        done = PassResult(result, matched, len(spans), tuple(refused), details)
        return done if not probes else self._kept(done, program, probes)

    def _kept(self, done: PassResult, program: Program, probes: Mapping[str, Tensor]) -> PassResult:
        """The result with what makes the same graph without data."""
        file = f"{calibration.numbered(program, self.name)}.safetensors"
        tensors = {f"probe.{part}": probe for part, probe in probes.items()}
        return dataclasses.replace(
            done,
            options=self.options.model_copy(update={"calibration": Path(file)}),
            calibration=Calibration(file, weights_digest(program), tensors),
        )

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
        router = tokens * width * (self.options.router == "probe")
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

    def _probes(
        self, program: Program, context: Context, spans: Sequence[Span]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """By part its router, and how much of the variance it explains."""
        if self.options.router == "random":
            return {}, {}
        parts = [span.part for span in spans]
        if self.options.calibration is not None:
            names = [part.name for part in parts]
            digest = weights_digest(program)
            found = calibration.read(self.options.calibration, digest, self.name, names)
            return {name: found[f"probe.{name}"] for name in names}, {}
        assert context.data is not None
        items = calibration.chosen_items(context.data, self.options.items, LEAST_ITEMS)
        return fitted(program, parts, context, items, self.name)
