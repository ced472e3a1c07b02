"""What modules are trained of, and under which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from thresher.compiler.contract import Context
from thresher.compiler.program import Program
from thresher.passes.learning.identity import identity
from thresher.passes.learning.options import DistilledBy, Patience, Rate
from thresher.passes.tokens.methods import Plan
from thresher.passes.tokens.modules.module import Module, Place
from thresher.passes.tokens.options import TokenOptions
from thresher.passes.tokens.reduce import Weights


class ModuleOptions(TokenOptions):
    """Options of a method with learned modules: how they are trained, or where they come from."""

    steps: Annotated[int, Field(ge=0, description="most steps of training")] = 300
    rate: Rate = 3e-3
    loss: DistilledBy = "auto"
    patience: Patience = 100
    calibration: Annotated[
        Path | None, Field(description="modules trained here before, instead of a training")
    ] = None
    published: Annotated[
        Path | None,
        Field(description="safetensors file of the published code with trained modules, instead of"
            " a training"),
    ] = None  # fmt: skip

    @model_validator(mode="after")
    def _one_origin(self) -> ModuleOptions:
        if self.calibration is not None and self.published is not None:
            raise ValueError("give calibration or published, not both")
        return self


@dataclass(frozen=True)
class Trained:
    """What came out: the modules, and how the training went (rows of its loss, one per step)."""

    weights: Weights
    loss: str = ""
    history: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Everything that is fixed during one training."""

    name: str
    program: Program
    plan: Plan
    module: Module
    places: Sequence[Place]
    options: ModuleOptions
    context: Context

    @property
    def facts(self) -> dict[str, str]:
        """What trained modules answer to."""
        layers = {"layers": " ".join(str(place.layer) for place in self.places)}
        counted = {"tokens": " ".join(str(place.kept) for place in self.places)}
        return layers | counted if self.module.counted else layers

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be of this training."""
        return {
            **identity(self.program, self.context),
            "pass": self.name,
            "counts": list(self.plan.counts),
            **self.options.model_dump(mode="json", exclude={"calibration", "published"}),
        }
