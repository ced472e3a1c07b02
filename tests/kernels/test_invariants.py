"""What holds for the torch definitions whatever they are given."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import thresher.kernels.ops  # noqa: F401
from tests.kernels import oracle
from tests.kernels.cases import (
    DiverseCase,
    EnergyCase,
    PruneMergeCase,
    diverse_cases,
    energy_cases,
    prune_merge_cases,
)
from tests.kernels.test_definitions import FAST, SINGLE, tensors

ops = torch.ops.thresher


@FAST
@given(diverse_cases())
def test_what_is_left_out_is_no_farther_than_the_last_pick(case: DiverseCase) -> None:
    """Greedy max-min is within a factor of two of the best: every token has a pick that near."""
    x, size = (torch.from_numpy(one).double() for one in case[:2])
    _, slot, kept = ops.select_diverse(x, size, *case[2:])
    unit = torch.nn.functional.normalize(x, dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    for b in range(len(x)):
        picks = [n for n in kept[b, case.protected :].tolist() if size[b, n] > 0]
        rest = [n for n in range(case.protected, x.shape[1]) if slot[b, n] < 0 and size[b, n] > 0]
        if len(picks) > 1 and rest:
            apart = min(float(distance[b, i, j]) for i in picks for j in picks if i != j)
            assert float(distance[b][rest][:, picks].amin(1).max()) <= apart + 1e-9


@FAST
@given(energy_cases(), st.floats(0.01, 100))
def test_energies_know_directions_only(case: EnergyCase, factor: float) -> None:
    """Neither lengths of keys nor sizes count, and no energy leaves the range of f."""
    metric, size = tensors(case.metric.astype(np.float64), case.size)
    found = ops.token_energy(metric, size, *case[2:])
    again = ops.token_energy(metric * factor, size * factor, *case[2:])
    assume(oracle.token_energy(case.metric, *case[1:]).margin > 1e-12)
    assert_allclose(again, found, atol=1e-12)
    assert (found.abs() <= 1 + 1e-12).all()


@FAST
@given(prune_merge_cases())
def test_sizes_of_real_tokens_never_fall_below_one(case: PruneMergeCase) -> None:
    _, size, _, kept = ops.prune_merge(*tensors(*case[:3]), *case[3:])
    real = tensors(case.size)[0].gather(1, kept) > 0
    assert (size[real] >= 1).all()
    assert (size[~real] == 0).all()


def test_a_joining_token_of_opposite_direction_leaves_the_size_at_one() -> None:
    x, size, score = (
        torch.tensor([[[1.0], [-1.0]]]),
        torch.tensor([[1.0, 5.0]]),
        torch.tensor([[2.0, 1]]),
    )
    y, out_size, slot, _ = ops.prune_merge(x, size, score, 2, 1, 0)
    assert (y.item(), out_size.item(), slot.tolist()) == (0.0, 1.0, [[0, 0]])


def test_a_full_count_changes_nothing() -> None:
    x, size, metric = torch.randn(2, 7, 3), torch.rand(2, 7) + 0.1, torch.randn(2, 2, 7, 4)
    y, out_size, slot, kept = ops.bipartite_merge(x, size, metric, 7, 1, True)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5])
    assert torch.equal(y, x[:, order])
    assert torch.equal(out_size, size[:, order])
    assert torch.equal(kept, order.expand(2, -1))
    assert torch.equal(slot.gather(1, kept), torch.arange(7).expand(2, -1))
    y, slot, kept = ops.keep_tokens(x, torch.rand(2, 7), 7, 2, False)
    assert torch.equal(y, x)
    assert torch.equal(slot, kept)
    y, out_size, slot, kept = ops.prune_merge(x, size, torch.rand(2, 7), 7, 7, 2)
    assert torch.equal(y, x)
    assert torch.equal(out_size, size)
    assert torch.equal(slot, kept)


def test_sizes_are_conserved_whatever_merges() -> None:
    x, size, metric = torch.randn(2, 21, 3), torch.rand(2, 21) + 0.1, torch.randn(2, 2, 21, 4)
    y, out_size, _, _ = ops.bipartite_merge(x, size, metric, 12, 1, True)
    assert_allclose(out_size.sum(1), size.sum(1), rtol=SINGLE)
    total = (y * out_size[..., None]).sum(1)
    assert_allclose(total, (x * size[..., None]).sum(1), rtol=1e-4, atol=1e-5)


def test_padding_never_touches_a_real_token() -> None:
    x, metric = torch.randn(1, 12, 3), torch.randn(1, 1, 12, 4)
    metric[:, :, 6:] = metric[:, :, :6]  # padding looks exactly like real tokens
    size = torch.ones(1, 12)
    size[:, 6:] = 0
    y, out_size, _, kept = ops.bipartite_merge(x, size, metric, 9, 0, True)  # 3 padded sources
    real = out_size[0] > 0
    assert torch.equal(y[0, real], x[0, kept[0, real]])
    assert int(real.sum()) == 6
