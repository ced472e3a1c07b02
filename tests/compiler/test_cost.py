"""The cost model against the closed form of the literature and against rewritten graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from thresher.compiler.analysis.cost import cost_model, node_cost, total_macs
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.contract import Context
from thresher.passes.tokens.methods import Pitome, PitomeOptions, TopkNorm
from thresher.passes.tokens.options import TokenOptions

N = TOKENS + 1
HEAD = WIDTH * 4


def by_hand(counts: list[int]) -> int:
    """4NC^2 + 2N^2C for attention at the incoming count, 4N'C^2 for this toy's MLP at the outgoing one."""
    total, tokens = HEAD, N
    for left in counts:
        total += 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH
        tokens = left
        total += 4 * tokens * WIDTH**2
    return total


PROGRAM = traced(Toy(Block(), Block(), Block()))
MODEL = cost_model(PROGRAM.graph, find_sites(PROGRAM))


def test_dense_cost_is_the_sum_over_nodes() -> None:
    assert MODEL.dense == total_macs(PROGRAM.graph) == by_hand([N, N, N])
    assert MODEL.macs([N, N, N]) == MODEL.dense
    assert MODEL.ideal([N, N, N]) == 1.0


@given(st.lists(st.integers(2, N), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_reduced_cost_is_the_closed_form(counts: list[int]) -> None:
    counts = [min(counts[: i + 1]) for i in range(3)]
    assert MODEL.macs(counts) == by_hand(counts)


@pytest.mark.parametrize("counts", [(8, 6, 4), (10, 5, 5), (9, 9, 9)])
def test_prediction_equals_the_rewritten_graph(counts: tuple[int, ...]) -> None:
    result = TopkNorm(TokenOptions(counts=counts))(PROGRAM, Context())
    inserted = sum(
        node_cost(n).macs
        for n in result.program.graph.nodes
        if "thresher" in str(n.target) and n.op == "call_function"
    )
    assert (
        total_macs(result.program.graph) - inserted == MODEL.macs(counts) == result.details["macs"]
    )


def test_the_energy_of_all_pairs_is_counted() -> None:
    result = Pitome(PitomeOptions(counts=(8, 6, 5)))(PROGRAM, Context())
    energies = [n for n in result.program.graph.nodes if "token_energy" in str(n.target)]
    pairs = [n * (n - 1) for n in (N, 8, 6)]  # all tokens with those behind the class token
    depth = energies[0].args[0].meta["val"].shape[-1]
    assert [node_cost(node, 5).macs for node in energies] == [5 * pair * depth for pair in pairs]
    assert result.details["inserted_macs"] > depth * sum(pairs)


def counted_by_torch(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-accumulates that torch itself counts while it runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2


@given(
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 1),
    st.sampled_from([1, 2]),
)
@settings(max_examples=12, deadline=None)
def test_convolutions_cost_what_torch_counts(
    rank: int, transposed: bool, kernel: int, stride: int, padding: int, groups: int
) -> None:
    kinds: Any = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    module = kinds[rank - 1](4, 6, kernel, stride, padding, groups=groups)
    x = torch.zeros(2, 4, *[5, 6, 7][:rank])
    exported = torch.export.export(module, (x,))
    for program in (exported, exported.run_decompositions()):
        assert total_macs(program.graph) == counted_by_torch(module, x)


def test_products_with_something_added_cost_what_torch_counts() -> None:
    class Sums(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            single = torch.addmm(a[0], a[0], b[0])
            return torch.baddbmm(a, a, b) + single

    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)
    assert total_macs(torch.export.export(Sums(), (a, b)).graph) == counted_by_torch(Sums(), a, b)
