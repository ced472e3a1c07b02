"""How many learners each token of a concrete input runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.linears import operand
from thresher.compiler.ledger import Positions, Recorder, in_graph_order, token_maps
from thresher.compiler.program import Program, module_path, provenance
from thresher.passes.depth.bypass import detours

_OURS = torch.ops.thresher
SITE = "site"  # a pass notes on an adaptive network what it stands for
OPERATORS = (_OURS.adaptive_mlp.default, _OURS.adaptive_gated_mlp.default)


@dataclass(frozen=True)
class Runs:
    """One adaptive network on a batch.

    Attributes:
        path: what it stands for.
        most: its learners L.
        k: int64 ``[B, N]``, learners that each token of the input runs, -1 where it does not come by:
            it was dropped, or skips the block; tokens that were merged run those of the one that they
            became.
    """

    path: str
    most: int
    k: np.ndarray


def learners_run(program: Program, inputs: Mapping[str, Tensor]) -> list[Runs]:
    """Run a Program; one entry for each adaptive network, in order, none if it has none."""
    networks = [node for node in program.graph.nodes if node.target in OPERATORS]
    if not networks:
        return []
    recorder = Recorder(program.exported.graph_module, {operand(node, 1).name for node in networks})
    with torch.inference_mode():
        recorder.run(*program.placeholder_values(inputs))
    ways = in_graph_order(program.graph, (*program.ledger, *detours(program)))
    maps = {one.entry.node: one for one in token_maps(program, inputs, ways)}
    positions = Positions(*next(iter(maps.values())).slot.shape) if maps else None
    found = []
    for node in program.graph.nodes:
        if positions is not None and node.name in maps:
            positions.through(maps[node.name])
        if node.target not in OPERATORS:
            continue
        k, most = recorder.found[operand(node, 1).name].numpy(), operand(node, 2)
        if positions is not None:
            k = positions.spread(k, -1)
        count = int(most.meta["val"].shape[0])
        path = provenance(node).get(SITE) or module_path(node) or node.name
        found.append(Runs(path, count, k.clip(-1, count)))
    return found
