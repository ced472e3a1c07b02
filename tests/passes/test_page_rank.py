"""Votes on the attention graph: against networkx, and what the options promise."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor

from tests.compiler.toys import HEADS, Block, TokenConv, Toy, traced
from tests.families.decisions import votes_of
from thresher.cli.passes import foresight
from thresher.compiler import optimize
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.recipe import parse_recipe
from thresher.models.sources import load_source
from thresher.passes.tokens.methods import Pitome, PitomeOptions, TokenReduction
from thresher.passes.tokens.zero_tprune import ZeroTPrune, ZeroTPruneOptions, importance

EVERY_HEAD = (0.0, float("inf"))


def attention(*shape: int, sharpness: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return (sharpness * logits).softmax(-1)


def test_many_votes_are_pagerank_on_what_is_alive() -> None:
    graph = attention(1, 1, 12)
    alive = torch.ones(1, 12, dtype=torch.float64)
    alive[0, [3, 7]] = 0
    found = importance(graph, alive, 100, EVERY_HEAD, None)[0]
    left = [i for i in range(12) if alive[0, i]]
    weights = graph[0, 0].tolist()
    network: nx.DiGraph[int] = nx.DiGraph()
    network.add_weighted_edges_from((i, j, weights[i][j]) for i in left for j in left)
    wanted = nx.pagerank(network, alpha=1.0, tol=1e-12)
    assert found[[3, 7]].tolist() == [0.0, 0.0]
    for node in left:
        assert float(found[node]) == pytest.approx(wanted[node] * len(left), abs=1e-9)


@pytest.mark.parametrize("favoured", [None, 0])
@pytest.mark.parametrize("votes", [1, 5, 30])
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 4.0])
def test_few_votes_of_many_heads(votes: int, favoured: int | None, sharpness: float) -> None:
    graph = attention(2, 4, 11, sharpness=sharpness)
    alive = torch.ones(2, 11, dtype=torch.float64)
    alive[1, 4:6] = 0
    found = importance(graph, alive, votes, (0.01, 0.7), favoured)
    for item in range(2):
        nodes = [i for i in range(11) if alive[item, i]]
        for node, score in votes_of(graph[item], nodes, votes, favoured).items():
            assert float(found[item, node]) == pytest.approx(score, rel=1e-9)


def test_a_head_out_of_the_window_counts_only_where_all_are() -> None:
    even, sharp = attention(1, 1, 9, sharpness=0.01), attention(1, 1, 9, sharpness=1.0)
    alive = torch.ones(1, 9, dtype=torch.float64)
    alone = importance(sharp, alive, 3, (0.01, 5.0), None)
    both = torch.cat([even, sharp], dim=1)
    torch.testing.assert_close(importance(both, alive, 3, (0.01, 5.0), None), alone)
    assert not torch.allclose(importance(both, alive, 3, EVERY_HEAD, None), alone)
    nowhere = importance(both, alive, 3, (6.0, 7.0), None)
    torch.testing.assert_close(nowhere, importance(both, alive, 3, EVERY_HEAD, None))


@pytest.mark.slow
def test_what_the_votes_cost_is_told() -> None:
    program = load_source("tests.cli.toy:vit")
    reduced = []
    for votes in (1, 11):
        options = {"keep": 0.5, "layers": [1], "votes": [votes] * 3}
        recipe = parse_recipe(f"passes: [zero-tprune: {options}]", "votes.yaml")
        reduced.append(optimize(program, recipe))
    one, eleven = (p.history[0].details["inserted_macs"] for p in reduced)
    macs = [total_macs(p.graph) for p in reduced]
    assert eleven - one == macs[1] - macs[0] == 10 * HEADS * 37**2
    assert one > 2 * HEADS * 37**2
    said = foresight(reduced[1].history)[-1]
    assert said == f"the steps themselves take {eleven / 1e9:.3g} G more"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"votes": (30, 0, 1)}, "votes are at least 1"),
        ({"variance": (0.7, 0.01)}, "the lower first"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ZeroTPruneOptions(**options)


@pytest.mark.parametrize("method", [Pitome(PitomeOptions()), ZeroTPrune(ZeroTPruneOptions())])
def test_depth_counts_blocks_whose_site_is_refused(method: TokenReduction[Any]) -> None:
    sites = find_sites(traced(Toy(Block(mixer=TokenConv()), Block(), Block())))
    assert [site.layer for site in sites.sites] == [1, 2]
    assert vars(vars(method.step(sites))["scorer"])["layers"] == 3
