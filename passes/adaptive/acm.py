"""The pass: feed-forward networks become adaptive computation modules, trained on data to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.ffn import FFN, Found
from thresher.compiler.contract import Calibration, Context, Pass, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.program import Program
from thresher.passes.adaptive import kept
from thresher.passes.adaptive.insert import insert
from thresher.passes.adaptive.job import AcmOptions, Distilled, Job
from thresher.passes.adaptive.sites import adaptable
from thresher.passes.adaptive.train import distil
from thresher.passes.learning.schedule import thinned
from thresher.passes.sparsity import calibration


class Acm(Pass[AcmOptions]):
    """Feed-forward networks of which each token runs a part: a gate chooses how many learners.

    Wójcik et al., "Adaptive Computation Modules: Granular Conditional Computation for Efficient
    Inference", AAAI 2025.  Attention stays as it is, and so do all weights outside of the networks.
    """

    name = "acm"
    summary = "cut feed-forward networks into learners that each token runs as many of as it needs"
    Options = AcmOptions
    needs_data = True
    trains = True

    def match(self, program: Program, context: Context) -> PassResult:
        """How many networks would be converted; no training."""
        return _counted(program, adaptable(program, self.options.learners))

    def run(self, program: Program, context: Context) -> PassResult:
        sites = adaptable(program, self.options.learners)
        counted, ffns = _counted(program, sites), sites.ffns
        if not ffns:
            return counted
        job, digest = Job(program, ffns, self.options, context), weights_digest(program)
        known = self.options.calibration is not None
        found = kept.restored(job, self.name, digest) if known else distil(job)
        exported = insert(program, ffns, found.modules, found.shares, self.name)
        result = replace(program, exported=exported)
        details = _details(program, result, ffns, found) | {"note": self._note(found, context)}
        file = f"{calibration.numbered(program, self.name)}.safetensors"
        trained = kept.tensors(found, ffns, self.options.budget)
        return replace(
            counted,
            program=result,
            details=details,
            options=self.options.model_copy(update={"calibration": Path(file)}),
            calibration=Calibration(file, digest, trained, self.options.facts),
        )

    def demand_data(self, context: Context) -> None:
        if self.options.calibration is None:
            super().demand_data(context)

    def _note(self, found: Distilled, context: Context) -> str:
        if self.options.calibration is not None:
            how = f"taken from {self.options.calibration.name}"
        else:
            assert context.data is not None
            judge = "its labels" if found.loss == "labels" else "the dense model's outputs"
            how = f"trained on {context.data.name} by {judge} in {sum(found.steps)} steps"
        return (
            f"{how}; of the feed-forward work {found.share:.3f} is run on data held out, at a budget of"
            f" {self.options.budget:g}"
        )


def _counted(program: Program, sites: Found) -> PassResult:
    matched = len(sites.ffns) + len(sites.refusals)
    return PassResult(program, matched, len(sites.ffns), tuple(sites.refusals))


def _details(
    before: Program, after: Program, ffns: Sequence[FFN], found: Distilled
) -> dict[str, Any]:
    """Costs to expect, and how the training went; plain data."""
    dense, macs = total_macs(before.graph), total_macs(after.graph)
    return {
        "dense_macs": dense,
        "macs": macs,
        "ideal": dense / macs,
        "share": found.share,
        "networks": {ffn.path: share for ffn, share in zip(ffns, found.shares, strict=True)},
        "distillation": {
            "loss": found.loss,
            "steps": list(found.steps),
            "tilt": found.tilt,
            "history": thinned(found.history),
        },
    }
