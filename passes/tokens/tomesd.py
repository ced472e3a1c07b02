"""ToMeSD: tokens merge before every self-attention and are back behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context, Options, Pass, PassResult
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program, Refusal
from thresher.passes.options import Flops
from thresher.passes.tokens import budget
from thresher.passes.tokens.around import Around, limits
from thresher.passes.tokens.attention_span import AttentionSpan, find_attention_spans
from thresher.passes.tokens.budget import Count
from thresher.passes.tokens.options import Multiple

DEFAULT_KEEP = 0.5
REDUCED = "tokens leave this network already: start from the original model"


class TomesdOptions(Options):
    """How many tokens run through an attention: at most one of ``r``, ``keep`` and ``flops``."""

    r: Annotated[int | None, Field(ge=0, description="tokens to merge away at each attention")] = (
        None
    )
    keep: Annotated[
        float | None,
        Field(ge=0.5, le=1, description="share of the tokens that run through each attention; half"
            " of them by default"),
    ] = None  # fmt: skip
    flops: Flops = None
    layers: Annotated[
        tuple[int, ...] | None,
        Field(description="self-attentions to merge around, from 0; by default all that can be"),
    ] = None
    multiple: Multiple = 1
    prop_attn: Annotated[
        bool,
        Field(description="count merged tokens by their size in attention; the published code does not"),
    ] = True  # fmt: skip
    combine: Annotated[
        Literal["mean", "mlerp"],
        Field(description="what merged tokens become: their mean, or one with the length of the"
            " longest of them (ToFu's MLERP)"),
    ] = "mean"  # fmt: skip

    @model_validator(mode="after")
    def _one_budget(self) -> TomesdOptions:
        given = [name for name in ("r", "keep", "flops") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one budget only, not {' and '.join(given)}")
        return self


class Tomesd(Pass[TomesdOptions]):
    """Merge the most similar tokens before self-attention and give each its group's result behind it.

    Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023, section 3.
    Training-free.  Outside of the attentions no token is gone, so it is for networks whose blocks, or
    heads, need every one.  Pairs are matched as in ToMe, by the similarity of the residual stream as
    published; the published choice of destinations, one in each 2 x 2 cell, is not made here.
    """

    name = "tomesd"
    summary = "merge tokens before each self-attention, put them back behind it (ToMeSD)"
    Options = TomesdOptions
    chooses_tokens = True

    def match(self, program: Program, context: Context) -> PassResult:
        spans, refused, count = self._plan(program)
        return PassResult(
            program, len(spans), len(changed(spans, count)), tuple(refused),
            foreseen(program, spans, count),
        )  # fmt: skip

    def run(self, program: Program, context: Context) -> PassResult:
        planned = self.match(program, context)
        spans, _, count = self._plan(program)
        merged = changed(spans, count)
        if not merged:
            return planned
        around = Around(
            program, merged, count, self.name,
            proportional=self.options.prop_attn,
            preserves_norm=self.options.combine == "mlerp",
        )  # fmt: skip
        exported, _ = around.run()
        made = dataclasses.replace(program, exported=exported)
        inserted = total_macs(made.graph) - planned.details["macs"]
        details = planned.details | {"inserted_macs": inserted}
        return dataclasses.replace(planned, program=made, details=details)

    def _plan(self, program: Program) -> tuple[list[AttentionSpan], list[Refusal], Count]:
        """Where tokens can merge, why not elsewhere, and how many stay."""
        if program.ledger or any(r.name == self.name and r.applied for r in program.history):
            return [], [Refusal("(graph)", REDUCED)], budget.share(1.0)
        spans, refused = find_attention_spans(program)
        attentions = len(spans) + len(refused)
        wrong = [n for n in self.options.layers or () if spans and not 0 <= n < attentions]
        if wrong:
            raise UsageError(
                f"layers={wrong[0]} does not exist: the model has {attentions} self-attentions,"
                f" 0 to {attentions - 1}"
            )
        if self.options.layers is not None:
            spans = [span for span in spans if span.layer in self.options.layers]
        return spans, refused, self._count(program, spans)

    def _count(self, program: Program, spans: Sequence[AttentionSpan]) -> Count:
        """What runs through each span."""
        multiple = self.options.multiple
        if self.options.r is not None:
            self._demand_room(spans, self.options.r)
            return Count("remove", self.options.r, multiple=multiple)
        if self.options.flops is None or not spans:
            return budget.share(self.options.keep or DEFAULT_KEEP).rounded(multiple)
        dense = total_macs(program.graph)
        ((count),) = budget.share_out(
            self.options.flops,
            lambda share: (budget.share(share).rounded(multiple),),
            lambda schedule: sum(_macs(dense, spans, c) for c in schedule if c) / dense,
            1.0,
            0.5,
        )
        assert count is not None
        return count

    @staticmethod
    def _demand_room(spans: Sequence[AttentionSpan], r: int) -> None:
        for span in spans:
            most = span.tokens - limits(span).least(span.tokens)
            if r > most:
                raise UsageError(
                    f"r={r} removes more than the {most} of {span.tokens} tokens that attention"
                    f" {span.layer} can lose ({span.sites.protected} are protected): give r={most} or"
                    " less, or keep"
                )


def changed(spans: Sequence[AttentionSpan], count: Count) -> list[AttentionSpan]:
    """The spans at which tokens merge."""
    return [span for span in spans if _left(span, count) < span.tokens]


def foreseen(program: Program, spans: Sequence[AttentionSpan], count: Count) -> dict[str, Any]:
    """Tokens in each attention, before and after, and the predicted cost of one item."""
    if not spans:
        return {}
    dense = total_macs(program.graph)
    macs = _macs(dense, spans, count)
    return {
        "attended": {span.layer: [span.tokens, _left(span, count)] for span in spans},
        "schedule": str(count),
        "dense_macs": dense,
        "macs": macs,
        "ideal": dense / macs,
    }


def _left(span: AttentionSpan, count: Count) -> int:
    return count.of(span.tokens, limits(span))


def _macs(dense: int, spans: Sequence[AttentionSpan], count: Count) -> int:
    saved = sum(span.macs(span.tokens) - span.macs(_left(span, count)) for span in spans)
    return round(dense - saved)
