"""The pass: feed-forward networks become adaptive computation modules, trained on data to a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.contract import Context, Pass, PassResult
from thresher.compiler.program import Program, Refusal
from thresher.passes.adaptive.insert import insert
from thresher.passes.adaptive.job import AcmOptions, Distilled, Job
from thresher.passes.adaptive.sites import adaptable
from thresher.passes.adaptive.train import distil

ROWS = 60  # of the history, at most


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
        ffns, refused = self._sites(program)
        return PassResult(program, len(ffns) + len(refused), len(ffns), tuple(refused))

    def run(self, program: Program, context: Context) -> PassResult:
        ffns, refused = self._sites(program)
        matched = len(ffns) + len(refused)
        if not ffns:
            return PassResult(program, matched, 0, tuple(refused))
        found = distil(Job(program, ffns, self.options, context))
        exported = insert(program, ffns, found.modules, found.shares, self.name)
        result = dataclasses.replace(program, exported=exported)
        details = _details(program, result, ffns, found) | {"note": self._note(found, context)}
        return PassResult(result, matched, len(ffns), tuple(refused), details)

    def _sites(self, program: Program) -> tuple[list[FFN], list[Refusal]]:
        """Networks of one activation, and why others are left alone.

        A lowered model holds one body of ``adaptive_mlp``, which has one activation.
        """
        found = adaptable(program, self.options.learners)
        fits, refused = list[FFN](), list(found.refusals)
        for ffn in found.ffns:
            assert ffn.form is not None
            first = fits[0].form if fits else ffn.form
            assert first is not None
            if ffn.form.activation != first.activation:
                why = f"{ffn.path} has the activation {ffn.form.activation} and {fits[0].path} has"
                why = f"{why} {first.activation}, and a model holds adaptive networks of one kind"
                refused.append(Refusal(ffn.down.name, why))
            else:
                fits.append(dataclasses.replace(ffn, layer=len(fits)))
        return fits, refused

    def _note(self, found: Distilled, context: Context) -> str:
        assert context.data is not None
        judge = "its labels" if found.loss == "labels" else "the dense model's outputs"
        return (
            f"trained on {context.data.name} by {judge} in {sum(found.steps)} steps; of the feed-forward"
            f" work {found.share:.3f} is run on data held out, at a budget of {self.options.budget:g}"
        )


def _details(
    before: Program, after: Program, ffns: Sequence[FFN], found: Distilled
) -> dict[str, Any]:
    """Costs to expect, and how the training went; plain data."""
    dense, macs = total_macs(before.graph), total_macs(after.graph)
    every = max(1, len(found.history) // ROWS)
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
            "history": found.history[::every],
        },
    }
