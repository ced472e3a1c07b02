"""The pass: feed-forward networks, and linears of attention, become adaptive computation modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Calibration, Context, Pass, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.program import Program, Refusal
from thresher.passes.adaptive import kept
from thresher.passes.adaptive.insert import insert
from thresher.passes.adaptive.job import AcmOptions, Distilled, Job
from thresher.passes.adaptive.projections import Projection, projections, unfused
from thresher.passes.adaptive.sites import Site, adaptable
from thresher.passes.adaptive.train import distil
from thresher.passes.learning import saved
from thresher.passes.learning.schedule import thinned


class Acm(Pass[AcmOptions]):
    """Networks and linears of which each token runs a part: a gate chooses how many learners.

    Wójcik et al., "Adaptive Computation Modules: Granular Conditional Computation for Efficient
    Inference", AAAI 2025.  Attention itself stays as it is, and so do all weights outside of the sites.
    """

    name = "acm"
    summary = "cut networks (and linears of attention) into learners that each token runs as many of as it needs"
    Options = AcmOptions
    needs_data = True
    trains = True

    def match(self, program: Program, context: Context) -> PassResult:
        """How many sites would be converted; no training."""
        _, sites, refusals = self._sites(program)
        return _counted(program, sites, refusals)

    def run(self, program: Program, context: Context) -> PassResult:
        given, sites, refusals = self._sites(program)
        counted = _counted(program, sites, refusals)
        if not sites:
            return counted
        job, digest = Job(given, sites, self.options, context), weights_digest(program)
        known = self.options.calibration is not None
        found = kept.restored(job, self.name, digest) if known else distil(job)
        exported = insert(given, sites, found.modules, found.shares, self.name)
        result = replace(program, exported=exported)
        details = _details(program, result, sites, found)
        details["note"] = self._note(found, details["projections"], context)
        file = f"{saved.numbered(program, self.name)}.safetensors"
        trained = kept.tensors(found, sites, self.options.budget)
        return replace(
            counted,
            program=result,
            details=details,
            options=self.options.model_copy(update={"calibration": Path(file)}),
            calibration=Calibration(file, digest, trained, self.options.facts),
        )

    def _sites(self, program: Program) -> tuple[Program, list[Site], list[Refusal]]:
        """The Program whose sites these are, and why others are left alone."""
        options, chosen = self.options, self.options.projections
        given = unfused(program, chosen, self.name) if chosen else program
        sites, refusals = list[Site](), list[Refusal]()
        if "ffn" in options.sites:
            found = adaptable(given, options.learners)
            sites, refusals = [*found.ffns], found.refusals
        if chosen:
            more, others = projections(given, chosen, options.learners, options.rank, len(sites))
            sites, refusals = [*sites, *more], [*refusals, *others]
        return given, sites, refusals

    def _note(
        self, found: Distilled, ranks: Mapping[str, Mapping[str, Any]], context: Context
    ) -> str:
        if self.options.calibration is not None:
            how = f"taken from {self.options.calibration.name}"
        else:
            assert context.data is not None
            judge = "its labels" if found.loss == "labels" else "the dense model's outputs"
            how = f"trained on {context.data.name} by {judge} in {sum(found.steps)} steps"
        work = "modules' work" if ranks else "feed-forward work"
        met = f"of the {work} {found.share:.3f} is run on data held out, at a budget of {self.options.budget:g}"
        return "; ".join([how, met, *_loss_of_rank(ranks)])


def _loss_of_rank(ranks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence on what linears of attention lose however many learners run, if there are such."""
    if not ranks:
        return []
    least = min(ranks.values(), key=lambda one: float(one["variance"]))
    return [
        f"linears of attention keep rank {least['rank']} of {least['of']}, and before the training at least"
        f" {least['variance']:.3f} of the variance of their results"
    ]


def _counted(program: Program, sites: Sequence[Site], refusals: Sequence[Refusal]) -> PassResult:
    return PassResult(program, len(sites) + len(refusals), len(sites), tuple(refusals))


def _details(
    before: Program, after: Program, sites: Sequence[Site], found: Distilled
) -> dict[str, Any]:
    """Costs to expect, and how the training went; plain data."""
    dense, macs = total_macs(before.graph), total_macs(after.graph)
    return {
        "dense_macs": dense,
        "macs": macs,
        "ideal": dense / macs,
        "share": found.share,
        "networks": {site.path: share for site, share in zip(sites, found.shares, strict=True)},
        "projections": {
            site.path: {"rank": site.rank, "of": site.width, "variance": part}
            for site, part in zip(sites, found.kept, strict=True)
            if isinstance(site, Projection)
        },
        "distillation": {
            "loss": found.loss,
            "steps": list(found.steps),
            "tilt": found.tilt,
            "history": thinned(found.history),
        },
    }
