"""What is distilled, from what and under which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from thresher.compiler import workers
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.contract import Context, Options
from thresher.compiler.program import Program
from thresher.passes.adaptive.learners import Learners


class AcmOptions(Options):
    """Options of the conversion and of its training."""

    budget: Annotated[
        float, Field(gt=0, le=1, description="share of the feed-forward work that is left")
    ] = 0.5
    learners: Annotated[
        int, Field(ge=1, le=16, description="parts that each feed-forward network is cut into")
    ] = 4
    distil_steps: Annotated[
        int, Field(ge=0, description="most steps of phase 1, each learner against the dense layer")
    ] = 100
    gate_steps: Annotated[
        int, Field(ge=0, description="most steps of phase 2, gates against the learners' errors")
    ] = 50
    steps: Annotated[int, Field(ge=0, description="most steps of phase 3, end to end")] = 200
    loss: Annotated[
        Literal["auto", "labels", "dense"],
        Field(description="judge by the labels or by distance to the dense model's outputs"),
    ] = "auto"
    patience: Annotated[
        int,
        Field(ge=1, description="end a phase when its mean loss of so many steps has not sunk"),
    ] = 100


@dataclass(frozen=True)
class Distilled:
    """What came out.

    Attributes:
        modules: one per network.
        shares: of each network's learners, how many run for a token on average on held-out data.
        share: the same of their work altogether.
        tilt: what was added to the logits, times the number of learners, to meet the budget.
        loss: name of the task's loss.
        steps: of each phase.
        history: rows of phase, task's loss and share of the work, one per step.
    """

    modules: Sequence[Learners]
    shares: tuple[float, ...]
    share: float
    tilt: float
    loss: str
    steps: tuple[int, ...]
    history: list[list[float]]


@dataclass(frozen=True)
class Job:
    """Everything that is fixed during one training."""

    program: Program
    ffns: Sequence[FFN]
    options: AcmOptions
    context: Context

    def fingerprint(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be of this training."""
        data = self.context.data
        return {
            "source": self.program.info.source,
            "weights": self.program.info.digest or self.program.info.weights,
            "networks": len(self.ffns),
            "data": data.name if data else "",
            "items": len(data) if data else 0,
            "seed": self.context.seed,
            "batch": self.context.batch,
            "workers": workers.count(),
            **self.options.model_dump(mode="json"),
        }
