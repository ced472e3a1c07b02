"""The pass: feed-forward networks become experts, of which a token runs those that would add most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler import workers
from thresher.compiler.analysis.cost import SHARE, total_macs
from thresher.compiler.analysis.ffn import FFN, Found, refuse
from thresher.compiler.contract import Calibration, Context, Pass, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter
from thresher.passes.adaptive.forward import NetworkForward
from thresher.passes.adaptive.insert import Weights, put_in_place
from thresher.passes.adaptive.job import Job
from thresher.passes.adaptive.sites import Site, adaptable
from thresher.passes.experts import kept
from thresher.passes.experts.calibrate import GRID, Runner, calibrated, seen_at, whole, work_of
from thresher.passes.experts.job import DEFAULT_BUDGET, ExpertsOptions, Routed
from thresher.passes.experts.mixture import Mixture, running
from thresher.passes.experts.train import RouterTraining, cut, orders
from thresher.passes.learning import saved
from thresher.passes.learning.batches import Batches
from thresher.passes.learning.schedule import thinned

TAU = "experts_tau"  # the constant of the graph, one for all networks, and its name in ONNX
aten = torch.ops.aten


class Experts(Pass[ExpertsOptions]):
    """Feed-forward networks of which each token runs a set of experts, as many as it needs.

    D2DMoE: Szatkowski et al., "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts
    Conversion", NeurIPS 2024.  The experts are the neurons that are there, and no weight of
    the model is trained: only routers are, and one number, tau, trades quality for work.
    """

    name = "experts"
    summary = "cut feed-forward networks into experts that each token runs as many of as it needs"
    Options = ExpertsOptions
    needs_data = True
    trains = True

    def match(self, program: Program, context: Context) -> PassResult:
        """How many networks would be cut; no training."""
        return _counted(program, _sites(program, self.options.experts))

    def run(self, program: Program, context: Context) -> PassResult:
        sites = _sites(program, self.options.experts)
        counted, ffns = _counted(program, sites), sites.ffns
        if not ffns:
            return counted
        job, digest = Job(program, ffns, self.options, context), weights_digest(program)
        with workers.joined():
            found = self._found(job, digest)
        exported = insert(program, ffns, found, self.name)
        result = replace(program, exported=exported)
        file = f"{saved.numbered(program, self.name)}.safetensors"
        decided = {"calibration": Path(file), "tau": found.tau, "budget": None, "flops": None}
        return replace(
            counted,
            program=result,
            details=_details(program, result, ffns, found)
            | {"note": self._note(found, ffns, context)},
            options=self.options.model_copy(update=decided),
            calibration=Calibration(file, digest, kept.tensors(found, ffns), self.options.facts),
        )

    def _found(self, job: Job[FFN, ExpertsOptions], digest: str) -> Routed:
        """Routers, trained or read; where there is data the tau and the shares are of it."""
        data = job.context.data
        if self.options.calibration is None:
            chosen = orders(job)
            training = RouterTraining(job, cut(job, chosen))
            training.run()
            found = Routed(
                training.mixtures, chosen, 1.0, (), (), training.explained(),
                len(training.history), training.history,
            )  # fmt: skip
        else:
            found = kept.restored(job, self.name, digest)
            if data is None and (self.options.budget, self.options.flops) != (None, None):
                raise UsageError(
                    f"pass {self.name!r}: the tau that meets a budget is found on data: add --learn-data DATA, or"
                    f" give tau ({self.options.calibration} was measured at {found.tau:g})"
                )
            if data is None:
                return found
        assert data is not None
        batches = Batches(data, job.context.batch, job.context.seed, labels=False)
        forward = NetworkForward(job.program, job.sites)
        runner = Runner(forward, found.mixtures, work_of(job.sites))
        tau = self.options.tau
        if tau is None:
            tau = calibrated(runner, batches, _budget(job, found.mixtures))
        seen = seen_at(tau, runner, batches.held_out())
        return replace(found, tau=tau, shares=seen.shares, curves=seen.curves())

    def _note(self, found: Routed, ffns: Sequence[FFN], context: Context) -> str:
        share = whole(found.shares, work_of(ffns))
        runs = f"tau={found.tau:g} runs {share:.3f} of the feed-forward work"
        if self.options.calibration is not None:
            how = f"routers taken from {self.options.calibration.name}"
            return f"{how}; {runs}{' on data held out' if context.data else ', by what was measured before'}"
        assert context.data is not None
        least = min(found.explained)
        return (
            f"routers trained on {context.data.name} in {found.steps} steps, which tell {least:.0%} or more of the"
            f" variance of what experts add; {runs} on data held out"
        )


def insert(program: Program, ffns: Sequence[FFN], found: Routed, made_by: str) -> ExportedProgram:
    """The graph with a router, the rule and an ``expert_mlp`` for each network; its old weights leave.

    One constant holds tau for all of them.
    """
    weights = [{**m.experts.trained(), **m.router()} for m in found.mixtures]
    writes = [
        partial(_network, mixture=mixture, share=share)
        for mixture, share in zip(found.mixtures, found.shares, strict=True)
    ]
    shared = {TAU: torch.tensor(found.tau, dtype=torch.float32)}
    return put_in_place(program, ffns, weights, writes, shared, made_by)


def _network(
    rewriter: Rewriter, site: Site, x: fx.Node, weights: Weights, mixture: Mixture, share: float
) -> fx.Node:
    inner = rewriter.emit(aten.linear.default, x, weights["inner"], weights["inner_bias"])
    opened = rewriter.emit(aten.relu.default, inner)
    outer = rewriter.emit(aten.linear.default, opened, weights["outer"], weights["outer_bias"])
    told = rewriter.emit(aten.abs.default, outer)
    run = rewriter.inline(running, told, weights[TAU])
    rewriter.at(site.down, **{SHARE: share})
    operands = [weights[name] for name in mixture.experts.trained()]
    layer = torch.ops.thresher.expert_mlp.default
    return rewriter.emit(layer, x, run, *operands, mixture.experts.activation)


def _budget(job: Job[FFN, ExpertsOptions], mixtures: Sequence[Mixture]) -> float:
    """The share of the experts' work that the budget leaves.

    Raises:
        VerdictError: less than one expert for each token would be left.
    """
    options, work = job.options, work_of(job.sites)
    experts, least = sum(work), 1 / options.experts
    if options.flops is None:
        wanted, outside, total, what = options.budget or DEFAULT_BUDGET, 0.0, experts, "budget"
    else:
        total, what = total_macs(job.program.graph), "flops"
        routers = sum(
            each * m.router_macs / (m.count * m.experts.macs)
            for each, m in zip(work, mixtures, strict=True)
        )
        outside = total - experts + routers
        wanted = (options.flops * total - outside) / experts
    if wanted < least:
        raise VerdictError(
            f"the budget {what}={getattr(options, what):g} cannot be met: when each token runs one of"
            f" {options.experts} experts, {(outside + least * experts) / total:.3f} of that work remains; ask for"
            " less, or cut more experts"
        )
    return wanted


def _sites(program: Program, experts: int) -> Found:
    """Plain networks that so many experts can share evenly."""
    found = adaptable(program, experts, "experts")
    gated = [ffn for ffn in found.ffns if ffn.gated]
    plain = [ffn for ffn in found.ffns if not ffn.gated]
    refusals = [
        refuse(ffn.down, "is gated, and experts are cut from plain networks only") for ffn in gated
    ]
    return Found(
        [replace(ffn, layer=layer) for layer, ffn in enumerate(plain)], [*found.refusals, *refusals]
    )


def _counted(program: Program, sites: Found) -> PassResult:
    matched = len(sites.ffns) + len(sites.refusals)
    return PassResult(program, matched, len(sites.ffns), tuple(sites.refusals))


def _details(before: Program, after: Program, ffns: Sequence[FFN], found: Routed) -> dict[str, Any]:
    """Costs to expect, what another tau would run, and how the training went; plain data."""
    dense, macs = total_macs(before.graph), total_macs(after.graph)
    paths, work = [ffn.path for ffn in ffns], work_of(ffns)
    knob = {
        f"{float(GRID[at]):.1f}": whole([float(curve[at]) for curve in found.curves], work)
        for at in range(0, len(GRID), 10)
    }
    return {
        "dense_macs": dense,
        "macs": macs,
        "ideal": dense / macs,
        "tau": found.tau,
        "share": whole(found.shares, work),
        "share_by_tau": knob,
        "networks": dict(zip(paths, found.shares, strict=True)),
        "routers_explain": dict(zip(paths, found.explained, strict=False)),
        "training": {"steps": found.steps, "history": thinned(found.history)},
    }
