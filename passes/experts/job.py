"""What is cut into experts, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from thresher.passes.adaptive.job import Trainable
from thresher.passes.experts.mixture import Mixture
from thresher.passes.learning.options import Patience
from thresher.passes.options import Flops

DEFAULT_BUDGET = 0.5


class ExpertsOptions(Trainable):
    """Options of the cut, the routers and the rule: at most one of ``tau``, ``budget`` and ``flops``."""

    no_matter: ClassVar[frozenset[str]] = frozenset({"calibration", "tau", "budget", "flops"})

    tau: Annotated[
        float | None,
        Field(ge=0, le=1, description="a token runs the experts that a router puts within this share of its"
            " largest: 0 runs one, 1 all"),
    ] = None  # fmt: skip
    budget: Annotated[
        float | None, Field(gt=0, le=1, description="share of the feed-forward work that is left")
    ] = None
    flops: Flops = None
    experts: Annotated[
        int, Field(ge=2, le=64, description="groups that the neurons of each network are cut into")
    ] = 8
    router: Annotated[int, Field(ge=1, description="hidden neurons of each router")] = 32
    steps: Annotated[
        int, Field(ge=0, description="most steps that the routers are trained for")
    ] = 200
    patience: Patience = 100
    calibration: Annotated[
        Path | None, Field(description="routers trained before, instead of a training")
    ] = None

    @model_validator(mode="after")
    def _one_budget(self) -> ExpertsOptions:
        if sum(given is not None for given in (self.tau, self.budget, self.flops)) > 1:
            raise ValueError("give one of tau, budget and flops, and null for the others")
        return self

    @property
    def facts(self) -> dict[str, str]:
        """What trained routers answer to, besides tau."""
        return {"experts": str(self.experts)}


@dataclass(frozen=True)
class Routed:
    """What came out.

    Attributes:
        mixtures: one per network.
        orders: ``[H]`` of each, its neurons expert by expert.
        tau: of the rule.
        shares: of each network's experts, how many run for a token on average on held-out data.
        curves: ``[101]`` of each: the same at tau 0, 0.01, ... 1, where the tokens are those of ``tau``.
        explained: of the variance of the experts' lengths, by network; empty where routers were trained before.
        steps: of the training.
        history: the loss of each step.
    """

    mixtures: Sequence[Mixture]
    orders: Sequence[Tensor]
    tau: float
    shares: tuple[float, ...]
    curves: Sequence[Tensor]
    explained: tuple[float, ...] = ()
    steps: int = 0
    history: list[float] = field(default_factory=list)
