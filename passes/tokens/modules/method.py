"""A token-reduction method whose step has learned weights: taken from a file, or trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.contract import Calibration, Context, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.program import Program
from thresher.passes.learning.saved import numbered
from thresher.passes.learning.schedule import thinned
from thresher.passes.tokens.methods import Plan, TokenReduction
from thresher.passes.tokens.modules import kept
from thresher.passes.tokens.modules.job import Job, ModuleOptions, Trained
from thresher.passes.tokens.modules.module import Module, Place
from thresher.passes.tokens.modules.student import Rewritten, Student
from thresher.passes.tokens.modules.train import train

__all__ = ["LearnedReduction", "ModuleOptions"]

M_co = TypeVar("M_co", bound=ModuleOptions, covariant=True)


class LearnedReduction(TokenReduction[M_co], Generic[M_co]):
    """Subclasses say which module stands at a site, and which step it is part of."""

    Options: ClassVar[type[ModuleOptions]] = ModuleOptions
    module: ClassVar[Module]
    needs_data = True
    trains = True

    def student(self, job: Job) -> Student:
        """What is trained: by default the reduced graph itself."""
        shaped = {p.layer: _zeros(self.module, p) for p in job.places}
        result, reduction = self.reduced(job.program, job.plan, shaped)
        return Rewritten(result.program, reduction)

    def run(self, program: Program, context: Context) -> PassResult:
        plan = self.plan(program)
        if not plan.applied:
            return PassResult(program, len(plan.sites.sites), 0, plan.refused, plan.details())
        job = Job(self.name, program, plan, self.module, places(plan), self.options, context)
        digest = weights_digest(program)
        found = self._found(job, digest)
        result, _ = self.reduced(program, plan, found.weights)
        file = f"{numbered(program, self.name)}.safetensors"
        details = result.details | {"note": self._note(found, context)}
        if found.history:
            details |= {"training": _summary(found)}
        return replace(
            result,
            details=details,
            options=self.options.model_copy(update={"calibration": Path(file), "published": None}),
            calibration=Calibration(file, digest, kept.tensors(found.weights), job.facts),
        )

    @property
    def decided(self) -> bool:
        return self.options.published is not None or super().decided

    def _found(self, job: Job, digest: str) -> Trained:
        if self.options.published is not None:
            return Trained(kept.published(job))
        if self.options.calibration is not None:
            return Trained(kept.restored(job, digest))
        return train(job, self.student(job))

    def _note(self, found: Trained, context: Context) -> str:
        given = self.options.published or self.options.calibration
        if given is not None:
            return f"modules taken from {given.name}"
        assert context.data is not None
        judge = "its labels and the" if found.loss == "labels" else "the"
        return (
            f"modules trained on {context.data.name} by {judge} dense model's outputs in"
            f" {len(found.history)} steps, all other weights frozen"
        )


def places(plan: Plan) -> list[Place]:
    """The sites at which tokens leave."""
    found: list[Place] = []
    protected = plan.sites.protected
    patches = before = hint_of(plan.sites.tokens) - protected
    for site, left in zip(plan.sites.sites, plan.counts, strict=True):
        kept = left - protected
        if kept != before:
            width = int(site.stream.meta["val"].shape[-1])
            heads = int(site.attention.q.meta["val"].shape[1])
            number = len(found)
            found.append(Place(site.layer, number, protected, before, kept, patches, width, heads))
        before = kept
    return found


def _zeros(module: Module, place: Place) -> dict[str, Any]:
    import torch

    return {name: torch.zeros(shape) for name, shape in module.shapes(place).items()}


def _summary(found: Trained) -> dict[str, Any]:
    """How it went, as plain data; the history is thinned."""
    return {"loss": found.loss, "steps": len(found.history), "history": thinned(found.history)}
