"""ATM: as many pairs merge as are alike enough on data, and small tokens join large ones in the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.sites import Site, Sites
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import VerdictError
from thresher.compiler.program import Program, Refusal
from thresher.kernels.matching import best_target
from thresher.kernels.split_merge.reference import halves
from thresher.passes.learning.calibration import chosen_items
from thresher.passes.tokens import budget
from thresher.passes.tokens.budget import Count, Schedule, Size
from thresher.passes.tokens.measured import Measured, Values, batches
from thresher.passes.tokens.methods import Plan, TokenReduction
from thresher.passes.tokens.options import BUDGETS, DEFAULT_FLOPS, TokenOptions
from thresher.passes.tokens.step import Merge, StepResult
from thresher.passes.tokens.view import SiteView

TRIES = 14  # values of alpha at most
NEAR = 0.001  # of the dense work: what a budget may be missed by
GRAIN = 1000  # shares are kept to a thousandth
LAST = Fraction(3, 4)  # of the depth: by default sizes decide from here on


@dataclass(frozen=True)
class MergeBySize(Merge):
    """As :class:`Merge`, and from the block ``first`` on the smaller half of the tokens joins the larger half.

    Merging two tokens costs ``n_i n_j / (n_i + n_j)`` times their distance, little where one of them is
    small.  ATM (Lee and Choi, ECAI 2025).
    """

    first: int = 0

    def emit(self, site: SiteView, keep: Size, pruned: int | None) -> StepResult:
        if site.layer < self.first:
            return super().emit(site, keep, pruned)
        assert site.size is not None
        node = site.emit(
            torch.ops.thresher.split_merge.default, site.x, site.size, site.k, site.size, keep,
            site.protected,
        )  # fmt: skip
        x, size, slot, kept = site.rewriter.outputs(node)
        return StepResult(node, x, size, slot, kept, 2, 3)

    def pairs(self, layer: int, metric: Tensor, size: Tensor, protected: int) -> Tensor:
        """Cosines ``[B, S]`` of what could merge at a block: of each source to its target, lowest for padding.

        Args:
            metric: ``[B, H, N, d]``.
            size: ``[B, N]``; 0 is padding.
        """
        source, target = self._sides(layer, size, protected)
        if target.shape[1] == 0:
            return metric.new_zeros(len(metric), 0)
        best, _ = best_target(size, metric, source, target)
        return torch.where(size.gather(1, source) > 0, best, -torch.inf)

    def _sides(self, layer: int, size: Tensor, protected: int) -> tuple[Tensor, Tensor]:
        if layer >= self.first:
            return halves(size, size, protected)
        behind = torch.arange(protected, size.shape[1])
        even = behind % 2 == 0
        return behind[even].expand(len(size), -1), behind[~even].expand(len(size), -1)


class AtmOptions(TokenOptions):
    """Options of ATM: ``alpha`` is one more budget, and it and ``flops`` take data."""

    alpha: Annotated[
        float | None,
        Field(description="cosine from which pairs merge at the first block; instead of it flops finds"
            " the highest one that meets the budget"),
    ] = None  # fmt: skip
    beta: Annotated[
        float,
        Field(ge=0, description="how fast that cosine falls: by exp(beta l) - 1 at block l, from 0"),
    ] = 0.02  # fmt: skip
    least: Annotated[
        float, Field(ge=-1, le=1, description="cosine below which it never falls")
    ] = 0.0  # fmt: skip
    by_size: Annotated[
        int | None,
        Field(ge=0, description="block from which the smaller half of the tokens joins the larger one"
            " instead of every second the others; by default the last quarter of the depth"),
    ] = None  # fmt: skip
    items: Annotated[int, Field(ge=1, description="items of the data to count pairs on")] = 128
    prop_attn: Annotated[
        bool, Field(description="count merged tokens by their size in attention")
    ] = True

    @model_validator(mode="after")
    def _alpha_is_a_budget(self) -> AtmOptions:
        other = next((name for name in BUDGETS if getattr(self, name) is not None), None)
        if self.alpha is not None and other is not None:
            raise ValueError(f"give one budget only, not alpha and {other}")
        if self.inflect and not self.counted:
            raise ValueError("inflect goes with r; where pairs are counted beta is the slope")
        return self

    @property
    def counted(self) -> bool:
        """Whether the counts are given, so that nothing has to be measured."""
        return not (self.r is None and self.keep is None and self.counts is None)

    def threshold(self, alpha: float, layer: int) -> float:
        """Cosine above which pairs merge at a block, numbered from 0."""
        return max(alpha - math.expm1(self.beta * layer), self.least)

    def given(self, schedule: Schedule, sites: Sites, counts: Sequence[int]) -> AtmOptions:
        """The options that ask for this schedule without data."""
        explicit: dict[str, Any] = {"counts": tuple(counts)}
        if not isinstance(sites.tokens, int):
            explicit = {"keep": tuple(1.0 if c is None else float(c.value) for c in schedule)}
        return self.model_copy(update={"flops": None, "alpha": None, "layers": None, **explicit})


class Atm(TokenReduction[AtmOptions]):
    """Merge as many pairs at a block as have a cosine above its threshold, on average over data.

    Lee and Choi, "Lossless Token Merging Even Without Fine-Tuning in Vision Transformers", ECAI 2025.
    Training-free.  The threshold of block l, from 1, is ``max(alpha - (exp(beta (l - 1)) - 1), least)``.
    As published, the number of pairs is a mean over the batch, so that an image's answer depends on its
    batch; here it is measured once on data and fixed.
    """

    name = "atm"
    summary = "merge as many pairs as are alike enough on data, in the end small tokens into large ones (ATM)"
    Options = AtmOptions
    by_share = False
    needs_data = True

    @property
    def decided(self) -> bool:
        return self.options.counted

    def step(self, sites: Sites) -> MergeBySize:
        first = self.options.by_size
        return MergeBySize(
            by_index=True, first=math.ceil(LAST * sites.blocks) if first is None else first
        )

    @property
    def proportional(self) -> bool:
        return self.options.prop_attn

    def asked(self, sites: Sites) -> TokenOptions:
        """With ``alpha`` nothing is known before pairs are counted."""
        return self.options if self.options.alpha is None else TokenOptions(r=0)

    def match(self, program: Program, context: Context) -> PassResult:
        return replace(self.run(program, context), program=program)

    def run(self, program: Program, context: Context) -> PassResult:
        plan = self.plan(program)
        if self.options.counted or plan.cost is None:
            return super().run(program, context)
        pairs = Pairs(self, program, plan, context)
        found = self._found(pairs)
        if not any(found.schedule):
            first = plan.sites.sites[0].attention.node.name
            why = Refusal(
                first, f"no pair of tokens has a cosine above {found.alpha:.3g}: lower alpha"
            )
            return PassResult(program, len(plan.sites.sites), 0, (why, *plan.refused))
        explicit = self.options.given(found.schedule, plan.sites, pairs.counts(found.schedule))
        result = type(self)(explicit).run(program, context)
        thresholds = [self.options.threshold(found.alpha, s.layer) for s in plan.sites.sites]
        told = {"alpha": found.alpha, "thresholds": thresholds, "note": self._note(found, pairs)}
        return replace(result, details=result.details | told, options=explicit)

    def _found(self, pairs: Pairs) -> Found:
        if self.options.alpha is not None:
            return pairs.found(self.options.alpha)
        target, layers = self.options.flops or DEFAULT_FLOPS, pairs.plan.sites.blocks
        strictest = 1 + math.expm1(self.options.beta * layers)  # nothing merges anywhere
        return within(pairs.found, target, self.options.least, strictest)

    def _note(self, found: Found, pairs: Pairs) -> str:
        return (
            f"counts are the pairs above a cosine of {found.alpha:.3f}, falling with the depth, in"
            f" {pairs.items} items of {pairs.data.name}: {found.share:.1%} of the dense work"
        )


@dataclass(frozen=True)
class Found:
    """The schedule that one ``alpha`` leads to, and its share of the dense work."""

    alpha: float
    schedule: Schedule
    share: float


class Pairs:
    """Counts the pairs above the thresholds of an ``alpha`` on data, site by site."""

    def __init__(self, method: Atm, program: Program, plan: Plan, context: Context) -> None:
        assert context.data is not None
        self.method, self.program, self.plan, self.context = method, program, plan, context
        self.data = context.data
        chosen = chosen_items(self.data, method.options.items)
        self.items = len(chosen)
        self.values = Values(program, batches(self.data, chosen, context.batch))
        self.step = method.step(plan.sites)
        self.limits = self.step.limits(plan.sites.protected)

    def found(self, alpha: float) -> Found:
        """What merges under an alpha."""
        sites, options = self.plan.sites, self.method.options
        wanted = None if options.layers is None else set(options.layers)
        everywhere = tuple(
            None if wanted is not None and i not in wanted else Count("remove", 0)
            for i in range(len(sites.sites))
        )

        def decide(site: Site, seen: Sequence[tuple[Tensor, Tensor]]) -> Count | None:
            self.context.progress(f"counting pairs at alpha {alpha:.4f}", site.layer, sites.blocks)
            return self._count(site.layer, options.threshold(alpha, site.layer), seen)

        run = Measured(
            self.program, sites, self.step, everywhere, self.method.name, self.method.proportional,
            self.values.again(), decide,
        )  # fmt: skip
        run.run(restore_outputs=False)
        schedule = tuple(run.found)
        assert self.plan.cost is not None
        return Found(alpha, schedule, float(self.plan.cost.share(self.counts(schedule))))

    def counts(self, schedule: Schedule) -> list[int]:
        """Tokens behind every site, at the traced length."""
        return budget.resolve(schedule, hint_of(self.plan.sites.tokens), self.limits)

    def _count(
        self, layer: int, threshold: float, seen: Sequence[tuple[Tensor, Tensor]]
    ) -> Count | None:
        """The mean over items, rounded down: of pairs, or of their share where lengths differ."""
        protected, multiple = self.plan.sites.protected, self.method.options.multiple
        pairs, shares = 0, 0.0
        for metric, size in seen:
            above = (self.step.pairs(layer, metric, size, protected) > threshold).sum(1)
            real = (size[:, protected:] > 0).sum(1).clamp(min=1)
            pairs += int(above.sum())
            shares += float((above / real).sum())
        if isinstance(self.plan.sites.tokens, int):
            gone = pairs // self.items
            return Count("remove", gone, multiple=multiple) if gone else None
        kept = max(math.ceil((1 - shares / self.items) * GRAIN) / GRAIN, 0.5)
        return budget.share(kept).rounded(multiple) if kept < 1 else None


def within(found: Callable[[float], Found], target: float, low: float, high: float) -> Found:
    """The strictest thresholds that were found to meet a target, between two alphas.

    A straight line between what is known proposes, and every other time the middle does.  At ``high``
    nothing merges.

    Raises:
        VerdictError: not even ``low`` meets it.
    """
    best, above, share = None, high, 1.0
    for number in range(TRIES):
        middle = (low + above) / 2
        if best is not None and number % 2:
            middle = low + (above - low) * (target - best.share) / (share - best.share)
        tried = found(middle)
        if tried.share > target:
            above, share = tried.alpha, tried.share
            continue
        low, best = tried.alpha, tried
        if target - tried.share < NEAR:
            break
    best = best or found(low)
    if best.share > target:
        raise VerdictError(
            f"the budget flops={target:g} cannot be met: with every pair above a cosine of {low:g} merged"
            f" {best.share:.3f} of the work is left; lower least or ask for less"
        )
    return best
