"""Where tokens leave: behind the attention of a block, which is where sites are found, or behind the block."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from torch import fx

from thresher.compiler.analysis.flow import dataflow
from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.restore import trunk


def between_blocks(graph: fx.Graph, sites: Sites) -> Sites:
    """The same sites, each moved to the last sum of its block; the last block, which has none behind it, has none.

    A node that needs every token and lies behind the new place lies behind the old one too, so the
    refusals hold.
    """
    stream = trunk(dataflow(graph), sites)
    place = {node: number for number, node in enumerate(graph.nodes)}
    moved = []
    for site, following in pairwise(sites.sites):
        first, beyond = place[site.stream], place[following.stream]
        inside = [node for node in stream if first <= place[node] < beyond]
        moved.append(replace(site, stream=max(inside, key=place.__getitem__)))
    return replace(sites, sites=moved)
