"""The methods: named compositions of a score, a budget, a selection and a combination."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.cost import CostModel, cost_model, total_macs
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.contract import Context, Pass, PassResult
from thresher.compiler.ledger import in_graph_order
from thresher.compiler.program import Program, Refusal
from thresher.passes.tokens.attention_span import advice
from thresher.passes.tokens.budget import Schedule, resolve
from thresher.passes.tokens.options import TokenOptions, schedule
from thresher.passes.tokens.places import between_blocks
from thresher.passes.tokens.reduce import Reduction, Weights
from thresher.passes.tokens.score import ClassAttention, Energy, Norm, Random, Scorer
from thresher.passes.tokens.step import Diverse, Keep, Merge, MergeRedundant, Step

ONE_BLOCK = "tokens leave between two blocks here, and there is one block: use tome or evit"
T_co = TypeVar("T_co", bound=TokenOptions, covariant=True)


@dataclass(frozen=True)
class Plan:
    """What a method would do to a Program, before anything is rewritten."""

    sites: Sites
    refused: tuple[Refusal, ...]
    schedule: Schedule = ()
    counts: tuple[int, ...] = ()
    cost: CostModel | None = None

    @property
    def applied(self) -> int:
        """Sites at which tokens leave."""
        before = [hint_of(self.sites.tokens), *self.counts]
        return sum(a != b for a, b in zip(before, self.counts, strict=False))

    def details(self) -> dict[str, Any]:
        """Token counts and the predicted cost of one item."""
        if self.cost is None or not self.counts:
            return {}
        return {
            "tokens": [hint_of(self.sites.tokens), *self.counts],
            "schedule": [str(count) if count else "" for count in self.schedule],
            "protected": self.sites.protected,
            "dense_macs": self.cost.dense,
            "macs": self.cost.macs(self.counts),
            "ideal": self.cost.ideal(self.counts),
        }


class TokenReduction(Pass[T_co], Generic[T_co]):
    """A token-reduction method; subclasses say which :class:`Step` it takes."""

    Options: ClassVar[type[TokenOptions]] = TokenOptions
    by_share: ClassVar[bool] = True
    chooses_tokens = True
    ensures = frozenset({"tokens-reduced"})

    @property
    def keeps_outputs(self) -> bool:
        return bool(self.options.restore)

    @abstractmethod
    def step(self, sites: Sites) -> Step:
        """The step taken at every site of a model."""

    def plan(self, program: Program) -> Plan:
        """Sites, counts and predicted cost; refusals instead of exceptions for what the model lacks."""
        sites = find_sites(program)
        if not sites.sites:
            return Plan(sites, (*sites.refusals, *advice(program)))
        step = self.step(sites)
        first = sites.sites[0].attention.node.name
        objection = step.objection(sites)
        if objection is None and step.between:
            sites = between_blocks(program.graph, sites)
            objection = None if sites.sites else ONE_BLOCK
        if objection:
            return Plan(sites, (Refusal(first, objection), *sites.refusals))
        cost = cost_model(program.graph, sites)
        limits = step.limits(sites.protected)
        chosen = schedule(self.asked(sites), sites, limits, cost, by_share=self.by_share)
        counts = resolve(chosen, hint_of(sites.tokens), limits)
        return Plan(sites, tuple(sites.refusals), chosen, tuple(counts), cost)

    def asked(self, sites: Sites) -> TokenOptions:
        """The options by which tokens are counted."""
        return self.options

    def match(self, program: Program, context: Context) -> PassResult:
        """What :meth:`run` would do, without doing it."""
        plan = self.plan(program)
        return PassResult(
            program, len(plan.sites.sites), plan.applied, plan.refused, plan.details()
        )

    def run(self, program: Program, context: Context) -> PassResult:
        plan = self.plan(program)
        if not plan.applied:
            return PassResult(program, len(plan.sites.sites), 0, plan.refused, plan.details())
        return self.reduced(program, plan)[0]

    def reduced(
        self, program: Program, plan: Plan, weights: Weights | None = None
    ) -> tuple[PassResult, Reduction]:
        """The Program without the tokens that a plan takes away, with a step's ``weights`` if it has any."""
        reduction = Reduction(
            program, plan.sites, self.step(plan.sites), plan.schedule, self.name, self.proportional,
            weights,
        )  # fmt: skip
        rewritten, ledger = reduction.run(restore_outputs=self.options.restore)
        reduced = dataclasses.replace(
            program,
            exported=rewritten,
            ledger=in_graph_order(rewritten.graph, (*program.ledger, *ledger)),
        )
        details = plan.details() | {"inserted_macs": total_macs(reduced.graph) - details_macs(plan)}
        result = PassResult(reduced, len(plan.sites.sites), len(ledger), plan.refused, details)
        return result, reduction

    @property
    def proportional(self) -> bool:
        """Whether attention behind a step counts tokens by their size."""
        return True


def details_macs(plan: Plan) -> int:
    """Predicted MACs of a plan."""
    assert plan.cost is not None
    return plan.cost.macs(plan.counts)


class TomeOptions(TokenOptions):
    """Options of ToMe."""

    prop_attn: Annotated[
        bool,
        Field(
            description="count merged tokens by their size in attention (off for MAE checkpoints)"
        ),
    ] = True
    order: Annotated[
        Literal["index", "reference"],
        Field(
            description="order of the tokens that stay: by index, or as the published code has it"
        ),
    ] = "index"

    combine: Annotated[
        Literal["mean", "mlerp"],
        Field(description="what merged tokens become: their mean, or one with the length of the"
            " longest of them (ToFu's MLERP)"),
    ] = "mean"  # fmt: skip


class Tome(TokenReduction[TomeOptions]):
    """Token merging: the most similar pairs of tokens become their size-weighted mean.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.  Training-free.  Without a class
    token the published code leaves kept tokens in the order of their similarity, where rounding in
    the last digit reorders the sequence; by default they stay in index order here.
    """

    name = "tome"
    summary = "merge the most similar tokens at every block (ToMe)"
    Options = TomeOptions
    by_share = False

    def step(self, sites: Sites) -> Step:
        by_index = sites.protected > 0 or self.options.order == "index"
        return Merge(by_index, preserves_norm=self.options.combine == "mlerp")

    @property
    def proportional(self) -> bool:
        return self.options.prop_attn


class EvitOptions(TokenOptions):
    """Options of EViT."""

    fuse: Annotated[
        bool, Field(description="fuse the dropped tokens into one, weighted by their score")
    ] = True


class Evit(TokenReduction[EvitOptions]):
    """Keep the tokens that the class token attends to, fuse the rest.

    Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token
    Reorganizations", ICLR 2022.
    """

    name = "evit"
    summary = "keep the tokens that the class token attends to, fuse the rest (EViT)"
    Options = EvitOptions

    def step(self, sites: Sites) -> Step:
        return Keep(ClassAttention(), fuse=self.options.fuse)


class PitomeOptions(TokenOptions):
    """Options of PiToMe."""

    prop_attn: Annotated[
        bool, Field(description="count merged tokens by their size in attention")
    ] = True
    margin: Annotated[
        float,
        Field(ge=0, le=1, description="cosine from which tokens are alike, at the first block; it"
            " falls linearly with the depth"),
    ] = 0.9  # fmt: skip


class Pitome(TokenReduction[PitomeOptions]):
    """Merge tokens that are like many others, and leave those alone that are like few.

    Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024.
    Training-free, and needs no class token.  The step is the paper's at every block; its published
    code takes another one in the first half of DeiT.
    """

    name = "pitome"
    summary = "merge the tokens that are like many others, leave the rest alone (PiToMe)"
    Options = PitomeOptions
    by_share = False

    def step(self, sites: Sites) -> Step:
        return MergeRedundant(Energy(self.options.margin, sites.blocks))

    @property
    def proportional(self) -> bool:
        return self.options.prop_attn


class ScoreReduction(TokenReduction[T_co], Generic[T_co]):
    """Top-k by a score, the rest dropped: what most pruning methods are."""

    @abstractmethod
    def scorer(self) -> Scorer:
        """The score to rank by."""

    def step(self, sites: Sites) -> Step:
        return Keep(self.scorer())


class TopkNorm(ScoreReduction[TokenOptions]):
    """Keep the tokens of largest norm: a baseline."""

    name = "topk-norm"
    summary = "keep the tokens of largest norm (baseline)"

    def scorer(self) -> Scorer:
        return Norm()


class RandomOptions(TokenOptions):
    """Options of the control."""

    seed: Annotated[int, Field(ge=0, description="which random order")] = 0


class RandomDrop(ScoreReduction[RandomOptions]):
    """Keep random tokens: the control that every score must beat."""

    name = "random"
    summary = "keep random tokens (the control that a score must beat)"
    Options = RandomOptions

    def scorer(self) -> Scorer:
        return Random(self.options.seed)


class MaxMin(TokenReduction[TokenOptions]):
    """Keep tokens that lie far from each other, whatever attends to them.

    Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR
    2025, which prunes the projected output of a vision encoder; here the stream of a block is what
    is compared.  Training-free, and needs no class token.
    """

    name = "max-min"
    summary = "keep tokens that lie far from each other (greedy max-min, as in DivPrune)"

    def step(self, sites: Sites) -> Step:
        return Diverse()
