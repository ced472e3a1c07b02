"""Reads the token ledger: where every token of a concrete input went, site by site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from thresher.compiler.program import LedgerEntry, Program


@dataclass(frozen=True)
class TokenMap:
    """One site's maps for a batch: ``slot`` int64 ``[B, N_in]`` (-1: dropped), ``kept`` int64 ``[B, N_out]``.

    Tokens that a pass appended are not among those that come in; ``kept`` is -1 where one of them stays.
    """

    entry: LedgerEntry
    slot: np.ndarray
    kept: np.ndarray

    def compose(self, before: np.ndarray) -> np.ndarray:
        """Positions after this site of tokens that were at ``before`` ``[B, M]`` (-1 stays -1)."""
        return _taken(self.slot, before, -1)


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


def in_graph_order(graph: fx.Graph, entries: Iterable[LedgerEntry]) -> tuple[LedgerEntry, ...]:
    """Entries as their nodes run: the order of a ledger, whichever pass wrote them first."""
    place = {node.name: number for number, node in enumerate(graph.nodes)}
    return tuple(sorted(entries, key=lambda entry: place.get(entry.node, -1)))


def token_maps(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    entries: Sequence[LedgerEntry] | None = None,
) -> list[TokenMap]:
    """Run a reduced Program on ``inputs`` and return the maps of every site, in order.

    Returns an empty list for a Program whose tokens were not reduced.

    Args:
        entries: to read instead of the Program's ledger.
    """
    import thresher.kernels.ops  # noqa: F401

    entries = program.ledger if entries is None else entries
    recorder = Recorder(program.exported.graph_module, {entry.node for entry in entries})
    with torch.inference_mode():
        recorder.run(*program.placeholder_values(inputs))
    return [_token_map(entry, recorder.found[entry.node]) for entry in entries]


def _token_map(entry: LedgerEntry, results: Sequence[torch.Tensor]) -> TokenMap:
    slot, kept = results[entry.slot].numpy(), results[entry.kept].numpy()
    own = slot.shape[1] - entry.appended
    return TokenMap(entry, slot[:, :own], np.where(kept < own, kept, -1))


class Positions:
    """Where the original tokens are, from site to site in the order in which they run.

    Their number tells where in the graph tokens stand: sites leave fewer, and where a later node sees
    more, those that left since there were so many were put back.  Where there never were so many, a pass
    appended others behind those of the last site.
    """

    def __init__(self, batch: int, tokens: int) -> None:
        self._latest = np.broadcast_to(np.arange(tokens), (batch, tokens))
        self._among = {tokens: self._latest}

    def among(self, tokens: int) -> np.ndarray:
        """``[B, N]``: positions of the original tokens among so many, -1 for those that are gone."""
        return self._among.get(tokens, self._latest)

    def spread(self, values: np.ndarray, gone: int) -> np.ndarray:
        """``[B, N]``: values ``[B, n]`` of the tokens at one place, by original token."""
        return _taken(values, self.among(values.shape[1]), gone)

    def through(self, token_map: TokenMap) -> np.ndarray:
        """``[B, N]``: positions behind a site."""
        behind = token_map.compose(self.among(token_map.slot.shape[1]))
        self._among[token_map.kept.shape[1]] = self._latest = behind
        return behind


def final_positions(maps: Sequence[TokenMap], tokens: int) -> list[np.ndarray]:
    """Where each original token is after each site: ``[B, N]`` per site, -1 once dropped.

    A site that takes all tokens again, because it needs every one, starts from all of them.
    """
    if not maps:
        return []
    positions = Positions(maps[0].slot.shape[0], tokens)
    return [positions.through(token_map) for token_map in maps]


def _taken(values: np.ndarray, where: np.ndarray, gone: int) -> np.ndarray:
    """``values[b, where[b, i]]``, and ``gone`` where that is below zero."""
    return np.where(where < 0, gone, np.take_along_axis(values, np.maximum(where, 0), axis=1))
