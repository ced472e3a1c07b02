"""Every token back in its place, for outputs and heads that need the whole grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import networkx as nx
import torch
from torch import fx

from thresher.compiler.analysis.residual import NORMS, summands
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.surgery import Rewriter

if TYPE_CHECKING:
    from thresher.passes.tokens.reduce import Version


def trunk(flow: nx.DiGraph[fx.Node], sites: Sites) -> set[fx.Node]:
    """The residual stream: the sites' tensors and every residual add between and behind them."""
    current = sites.sites[0].stream
    normed = current.target in NORMS
    found = {current}
    behind = nx.descendants(flow, current)
    for node in flow:
        if node not in behind or current not in summands(node):
            continue
        users = list(node.users)
        current = users[0] if normed and len(users) == 1 and users[0].target in NORMS else node
        found.add(current)
    return found


def restore(rewriter: Rewriter, x: fx.Node, versions: Sequence[Version], drops: bool) -> fx.Node:
    """``[B, N', C] -> [B, N, C]``: merged tokens read their group, dropped ones what they last were.

    Where nothing was dropped, one gather by the composed maps does it.
    """
    steps = [v.step for v in versions]
    if not drops:
        slot = None
        for step in steps:
            assert step is not None
            slot = (
                step.slot
                if slot is None
                else rewriter.emit(torch.ops.aten.gather.default, step.slot, 1, slot)
            )
        return rewriter.emit(torch.ops.thresher.gather_tokens.default, x, slot)
    for version in reversed(versions):
        assert version.step is not None
        x = rewriter.emit(
            torch.ops.thresher.restore_tokens.default, x, version.step.slot, version.before
        )
    return x
