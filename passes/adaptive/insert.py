"""Other networks put in place of parts of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.cost import SHARE
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter
from thresher.passes.adaptive.learners import Learners
from thresher.passes.adaptive.runs import SITE
from thresher.passes.adaptive.sites import Site

Weights = Mapping[str, fx.Node]
Write = Callable[
    [Rewriter, Site, fx.Node, Weights], fx.Node
]  # of what a site reads: what it writes


def insert(
    program: Program,
    sites: Sequence[Site],
    modules: Sequence[Learners],
    shares: Sequence[float],
    made_by: str,
) -> ExportedProgram:
    """The graph with a gate and an ``adaptive_mlp`` for each site; its old weights leave.

    ``shares`` are the parts of the modules' work to expect, noted for the cost model.
    """
    weights = [dict(module.named_parameters()) for module in modules]
    writes = [
        partial(_module, module=module, share=share)
        for module, share in zip(modules, shares, strict=True)
    ]
    return put_in_place(program, sites, weights, writes, {}, made_by)


def put_in_place(
    program: Program,
    sites: Sequence[Site],
    weights: Sequence[Mapping[str, Tensor]],
    writes: Sequence[Write],
    shared: Mapping[str, Tensor],
    made_by: str,
) -> ExportedProgram:
    """The graph with what ``writes`` emit for each site; its old weights leave.

    ``weights`` are constants of one site each, ``shared`` those of all; a site's function sees both by
    name.
    """
    rewriter = Rewriter(program, made_by)
    constants = {name: tensor.detach() for name, tensor in shared.items()}
    for site, own in zip(sites, weights, strict=True):
        constants |= {f"{name}_of_{site.down.name}": t.detach() for name, t in own.items()}
    at = {site.down: place for place, site in enumerate(sites)}
    gone = frozenset[fx.Node]().union(*(site.inner for site in sites))
    inputs, made = set(program.input_nodes()), dict[str, fx.Node]()
    for node in program.graph.nodes:
        if node.op == "output" or node in gone:
            continue
        if node in inputs and not made:
            made = {name: rewriter.constant(name, tensor) for name, tensor in constants.items()}
        if node not in at:
            rewriter.copy(node)
            continue
        site, own = sites[at[node]], weights[at[node]]
        named = {name: made[f"{name}_of_{site.down.name}"] for name in own}
        named |= {name: made[name] for name in shared}
        assert site.x is not None
        rewriter.at(node)
        rewriter.map[node] = writes[at[node]](rewriter, site, rewriter.map[site.x], named)
    outputs = [rewriter.map[n] for n in program.output_nodes()]
    return rewriter.finish(outputs, constants, _unread(sites))


def _module(
    rewriter: Rewriter, site: Site, x: fx.Node, weights: Weights, module: Learners, share: float
) -> fx.Node:
    ours = torch.ops.thresher
    gate = (weights[name] for name in module.gates())
    k = rewriter.emit(ours.adaptive_gate.default, x, *gate)
    rewriter.at(site.down, **{SHARE: share, SITE: site.path})
    layer = ours.adaptive_gated_mlp if module.gated else ours.adaptive_mlp
    operands = [weights[name] for name in module.trained()]
    return rewriter.emit(layer.default, x, k, *operands, module.activation)


def _unread(sites: Sequence[Site]) -> frozenset[str]:
    """Old weights that nobody else reads."""
    old = {linear for site in sites for linear in (*site.linears, site.down)}
    read = {weight for site in sites for weight in site.weights}
    return frozenset(weight.name for weight in read if all(user in old for user in weight.users))
