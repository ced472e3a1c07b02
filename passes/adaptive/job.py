"""What is distilled, from what and under which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from pydantic import Field

from thresher.compiler.contract import Context, Options
from thresher.compiler.program import Program
from thresher.passes.adaptive.learners import Learners
from thresher.passes.adaptive.sites import Site
from thresher.passes.learning.identity import identity
from thresher.passes.learning.options import JudgedBy, Patience


class Trainable(Options):
    """Options of a pass that trains.

    Attributes:
        no_matter: names of those by which no training differs.
    """

    no_matter: ClassVar[frozenset[str]] = frozenset({"calibration"})


S_job = TypeVar("S_job", bound=Site)
O_job = TypeVar("O_job", bound=Trainable)


Kind: TypeAlias = Literal["ffn", "qkv", "out"]


class AcmOptions(Trainable):
    """Options of the conversion and of its training."""

    budget: Annotated[
        float, Field(gt=0, le=1, description="share of the modules' work that is left")
    ] = 0.5
    learners: Annotated[
        int, Field(ge=1, le=16, description="parts that each feed-forward network is cut into")
    ] = 4
    sites: Annotated[
        tuple[Kind, ...],
        Field(
            min_length=1,
            description="what becomes modules: ffn (feed-forward networks), qkv (linears that attention reads),"
            " out (linears that read attention)",
        ),
    ] = ("ffn",)
    rank: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="of qkv and out, rank that all learners together keep, as a share of the width; 0.5 costs"
            " about what the dense linear does",
        ),
    ] = 0.5
    distil_steps: Annotated[
        int, Field(ge=0, description="most steps of phase 1, each learner against the dense layer")
    ] = 100
    gate_steps: Annotated[
        int, Field(ge=0, description="most steps of phase 2, gates against the learners' errors")
    ] = 50
    steps: Annotated[int, Field(ge=0, description="most steps of phase 3, end to end")] = 200
    loss: JudgedBy = "auto"
    patience: Patience = 100
    calibration: Annotated[
        Path | None, Field(description="modules trained before, instead of a training")
    ] = None

    @property
    def facts(self) -> dict[str, str]:
        """What trained modules answer to, besides the budget of their gates."""
        ranked = {"rank": f"{self.rank:g}"} if self.projections else {}
        return {"learners": str(self.learners), "sites": ",".join(self.sites), **ranked}

    @property
    def projections(self) -> tuple[str, ...]:
        """The chosen kinds that are linears of attention."""
        return tuple(kind for kind in self.sites if kind != "ffn")


@dataclass(frozen=True)
class Distilled:
    """What came out.

    Attributes:
        modules: one per site.
        kept: of each, the part of the dense result's variance on data that all learners begin with: 1, or less
            where the rank is less.
        shares: of each site's learners, how many run for a token on average on held-out data.
        share: the same of their work altogether.
        tilt: what was added to the logits, times the number of learners, to meet the budget.
        loss: name of the task's loss, empty where modules were trained before.
        steps: of each phase.
        history: rows of phase, task's loss and share of the work, one per step.
    """

    modules: Sequence[Learners]
    kept: tuple[float, ...]
    shares: tuple[float, ...]
    share: float
    tilt: float = 0.0
    loss: str = ""
    steps: tuple[int, ...] = ()
    history: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Job(Generic[S_job, O_job]):
    """Everything that is fixed during one training."""

    program: Program
    sites: Sequence[S_job]
    options: O_job
    context: Context

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be of this training."""
        return {
            **identity(self.program, self.context),
            "networks": len(self.sites),
            **self.options.model_dump(mode="json", exclude=set(self.options.no_matter)),
        }
