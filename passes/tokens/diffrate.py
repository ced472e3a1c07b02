"""DiffRate: one ranking, its tail pruned, what stands just above merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, model_validator

from thresher.compiler.analysis.sites import Sites
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.program import Program
from thresher.passes.learning.schedule import thinned
from thresher.passes.tokens.budget import Count
from thresher.passes.tokens.learning.job import Job, Learned, LearningOptions
from thresher.passes.tokens.learning.train import learn
from thresher.passes.tokens.methods import TokenReduction
from thresher.passes.tokens.options import DEFAULT_FLOPS, TokenOptions
from thresher.passes.tokens.score import ClassAttention, ReceivedAttention
from thresher.passes.tokens.step import PruneMerge, Step

UNLEARNED = "counts are shared out evenly, not learned: give data to learn from"


class DiffRateOptions(TokenOptions, LearningOptions):
    """Options of DiffRate; those of learning count where a FLOPs budget meets data."""

    learn: Annotated[bool, Field(description="with a FLOPs budget and data: learn the counts")] = (
        True
    )

    prune: Annotated[
        tuple[int, ...] | None,
        Field(
            description="with counts: tokens after pruning in each block, before the rest merges;"
            " by default half of the tokens that go are pruned"
        ),
    ] = None

    @model_validator(mode="after")
    def _prune_goes_with_counts(self) -> DiffRateOptions:
        if self.prune is not None and len(self.prune) != len(self.counts or ()):
            raise ValueError("prune has one entry for each of counts")
        return self

    @property
    def learns(self) -> bool:
        """Whether the budget leaves the counts open."""
        return self.learn and self.r is None and self.keep is None and self.counts is None

    def explicit(self) -> tuple[Count, ...] | None:
        if self.counts is None or self.prune is None:
            return super().explicit()
        pairs = zip(self.prune, self.counts, strict=True)
        return tuple(Count("exact", count, pruned=pruned) for pruned, count in pairs)


class DiffRate(TokenReduction[DiffRateOptions]):
    """Prune the tokens that the class token attends to least, merge the next ones into the rest.

    Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV
    2023.  Counts are those that the options give; with a FLOPs budget they are learned on data, and
    without data shared out evenly.  Models without a class token
    are ranked by the attention that each token receives, and only merge, as the published
    CAFormer patch does.  Half pruned and half merged, without ``prune``, is thresher's own default.
    """

    name = "diffrate"
    summary = "prune the least attended tokens and merge the next ones, at every block (DiffRate)"
    Options = DiffRateOptions
    by_share = False

    def step(self, sites: Sites) -> Step:
        if sites.class_token is None:
            return PruneMerge(ReceivedAttention(), prunes=False)
        return PruneMerge(ClassAttention())

    def run(self, program: Program, context: Context) -> PassResult:
        if not self.options.learns:
            return super().run(program, context)
        if context.data is None:
            result = super().run(program, context)
            return replace(result, details=result.details | {"note": UNLEARNED})
        plan = self.plan(program)
        if plan.cost is None or not plan.applied:
            return super().run(program, context)
        target = self.options.flops or DEFAULT_FLOPS
        job = Job(program, plan.sites, plan.cost, target, self.options, context)
        learned = learn(job)
        explicit = self.options.model_copy(
            update={"flops": None, "prune": learned.prune, "counts": learned.counts}
        )
        result = type(self)(explicit).run(program, context)
        told = {"learning": _summary(learned), "note": _note(learned, context)}
        return replace(result, details=result.details | told, options=explicit)


def _summary(learned: Learned) -> dict[str, Any]:
    """How it went, as plain data; the history is thinned."""
    return {
        "loss": learned.loss,
        "steps": learned.steps,
        "flops_before_fitting": learned.history[-1][1],
        "gain": learned.gain,
        "history": thinned(learned.history),
    }


def _note(learned: Learned, context: Context) -> str:
    assert context.data is not None
    judge = "its labels" if learned.loss == "labels" else "the dense model's outputs"
    if not learned.gain:
        return (
            f"even counts: {learned.steps} steps of learning on {context.data.name} by {judge} found"
            " none with a lower loss"
        )
    return (
        f"counts learned on {context.data.name} by {judge} in {learned.steps} steps, with a loss"
        f" {learned.gain:.2g} below that of even counts; they do not transfer blindly to other data"
    )
