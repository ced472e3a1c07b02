"""What is learned, from what and under which options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.cost import CostModel
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.contract import Context, Options
from thresher.compiler.program import Program
from thresher.passes.learning.identity import identity
from thresher.passes.learning.options import JudgedBy


class LearningOptions(Options):
    """How counts are learned."""

    steps: Annotated[int, Field(ge=1, description="most steps of learning")] = 300
    granularity: Annotated[int, Field(ge=1, description="candidate counts lie this far apart")] = 4
    loss: JudgedBy = "auto"
    patience: Annotated[
        int, Field(ge=1, description="stop when the counts have not changed for so many steps")
    ] = 50


@dataclass(frozen=True)
class Learned:
    """What came out.

    ``prune`` and ``counts`` are the tokens behind each site after pruning and after merging, prefix
    included; ``share`` is their cost over the dense one; ``loss`` names what was minimised; each
    row of ``history`` is the task's loss, the cost and the counts of one step; ``gain`` is how much
    lower the loss is than with even counts of the same cost.
    """

    prune: tuple[int, ...]
    counts: tuple[int, ...]
    share: float
    loss: str
    steps: int
    history: list[list[float]]
    gain: float = 0.0


@dataclass(frozen=True)
class Job:
    """Everything that is fixed during one training."""

    program: Program
    sites: Sites
    cost: CostModel
    target: float
    options: LearningOptions
    context: Context

    @property
    def prunes(self) -> bool:
        """Models without a class token only merge."""
        return self.sites.class_token is not None

    @property
    def tokens(self) -> int:
        return hint_of(self.sites.tokens)

    @property
    def patches(self) -> int:
        return self.tokens - self.sites.protected

    @property
    def layers(self) -> list[int]:
        """Indices of the sites that learn: not the first, nor the last where tokens are pooled."""
        last = len(self.sites.sites) - (0 if self.prunes else 1)
        return list(range(1, last))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be of this training."""
        return {
            **identity(self.program, self.context),
            "tokens": self.tokens,
            "sites": len(self.sites.sites),
            "target": self.target,
            **self.options.model_dump(mode="json"),
        }
