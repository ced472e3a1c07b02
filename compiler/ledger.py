"""Reads the token ledger: where every token of a concrete input went, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from thresher.compiler.program import LedgerEntry, Program


@dataclass(frozen=True)
class TokenMap:
    """One site's maps for a batch: ``slot`` int64 ``[B, N_in]`` (-1: dropped), ``kept`` int64 ``[B, N_out]``."""

    entry: LedgerEntry
    slot: np.ndarray
    kept: np.ndarray

    def compose(self, before: np.ndarray) -> np.ndarray:
        """Positions after this site of tokens that were at ``before`` ``[B, M]`` (-1 stays -1)."""
        moved = np.take_along_axis(self.slot, np.maximum(before, 0), axis=1)
        return np.where(before < 0, -1, moved)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the results of nodes by name."""

    def __init__(self, module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.found[n.name] = result
        return result


def token_maps(program: Program, inputs: Mapping[str, torch.Tensor]) -> list[TokenMap]:
    """Run a reduced Program on ``inputs`` and return the maps of every site, in order.

    Returns an empty list for a Program whose tokens were not reduced.
    """
    import thresher.kernels.ops  # noqa: F401

    recorder = Recorder(program.exported.graph_module, {entry.node for entry in program.ledger})
    with torch.inference_mode():
        recorder.run(*program.placeholder_values(inputs))
    return [
        TokenMap(
            entry,
            recorder.found[entry.node][entry.slot].numpy(),
            recorder.found[entry.node][entry.kept].numpy(),
        )
        for entry in program.ledger
    ]


def final_positions(maps: list[TokenMap], tokens: int) -> list[np.ndarray]:
    """Where each original token is after each site: ``[B, N]`` per site, -1 once dropped."""
    if not maps:
        return []
    position = np.broadcast_to(np.arange(tokens), (maps[0].slot.shape[0], tokens))
    found = []
    for token_map in maps:
        position = token_map.compose(position)
        found.append(position)
    return found
