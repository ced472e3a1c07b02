"""How many learners each token of a concrete input runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.linears import operand
from thresher.compiler.ledger import Recorder, final_positions, token_maps
from thresher.compiler.program import Program, module_path

_OURS = torch.ops.thresher
OPERATORS = (_OURS.adaptive_mlp.default, _OURS.adaptive_gated_mlp.default)


@dataclass(frozen=True)
class Runs:
    """One adaptive network on a batch.

    Attributes:
        path: the module that it stands in.
        most: its learners L.
        k: int64 ``[B, N]``, learners that each token of the input runs, -1 once it was dropped;
            tokens that were merged run those of the one that they became.
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
    maps = token_maps(program, inputs)
    positions = final_positions(maps, maps[0].slot.shape[1]) if maps else []
    place = {node.name: number for number, node in enumerate(program.graph.nodes)}
    found = []
    for node in networks:
        k, most = recorder.found[operand(node, 1).name].numpy(), operand(node, 2)
        before = [
            p
            for m, p in zip(maps, positions, strict=True)
            if place[m.entry.node] < place[node.name]
        ]
        if before:
            k = np.where(before[-1] < 0, -1, np.take_along_axis(k, np.maximum(before[-1], 0), 1))
        count = int(most.meta["val"].shape[0])
        found.append(Runs(module_path(node) or node.name, count, k.clip(-1, count)))
    return found
