"""The torch definitions equal the loops, and carry shapes and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch.library import opcheck

import thresher.kernels.ops  # noqa: F401
from tests.kernels import oracle
from tests.kernels.cases import (
    PROTECTED,
    DiverseCase,
    EnergyCase,
    KeepCase,
    MergeCase,
    PruneMergeCase,
    RedundantCase,
    SoftCase,
    diverse_cases,
    energy_cases,
    fewest,
    keep_cases,
    merge_cases,
    prune_merge_cases,
    redundant_cases,
    soft_cases,
)

ops = torch.ops.thresher
SINGLE = 2.0**-22  # a few float32 roundings
HALF = 2.0**-10
MARGIN = 1e-5  # similarities nearer than this may be ordered either way in float32
FAST = settings(max_examples=60, deadline=None, derandomize=True)


def tensors(*arrays: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]


def scale(array: Any) -> float:
    return float(np.abs(array).max(initial=1e-30))


@FAST
@given(merge_cases())
def test_merge(case: MergeCase) -> None:
    expected = oracle.bipartite_merge(*case)
    assume(expected.margin > MARGIN)
    found = ops.bipartite_merge(*tensors(*case[:3]), *case[3:])
    assert_array_equal(found[2], expected.slot)
    assert_array_equal(found[3], expected.kept)
    assert_allclose(found[1], expected.out_size, rtol=SINGLE)
    assert_allclose(found[0], expected.y, atol=SINGLE * scale(case.x))


@FAST
@given(merge_cases(dtype="float16"))
def test_merge_half(case: MergeCase) -> None:
    expected = oracle.bipartite_merge(*case)
    assume(expected.margin > MARGIN)
    y, size, slot, _ = ops.bipartite_merge(*tensors(*case[:3]), *case[3:])
    assert y.dtype == torch.float16
    assert size.dtype == torch.float32
    assert_array_equal(slot, expected.slot)
    assert_allclose(y, expected.y, atol=HALF * scale(case.x))


@FAST
@given(merge_cases())
def test_merge_in_double_precision_is_the_oracle(case: MergeCase) -> None:
    x, size, metric = (a.astype(np.float64) for a in case[:3])
    expected = oracle.bipartite_merge(x, size, metric, *case[3:])
    assume(expected.margin > 1e-12)
    y, *_ = ops.bipartite_merge(*tensors(x, size, metric), *case[3:])
    assert_allclose(y, expected.y, atol=1e-14 * scale(case.x))


@FAST
@given(keep_cases())
def test_keep(case: KeepCase) -> None:
    y, slot, kept = ops.keep_tokens(*tensors(*case[:2]), *case[2:])
    expected = oracle.keep_tokens(*case)
    assert_array_equal(slot, expected[1])
    assert_array_equal(kept, expected[2])
    assert_allclose(y, expected[0], atol=8 * SINGLE * scale(expected[0]))


@FAST
@given(diverse_cases())
def test_select_diverse(case: DiverseCase) -> None:
    expected = oracle.select_diverse(*case)
    assume(expected.margin > MARGIN)
    y, slot, kept = ops.select_diverse(*tensors(*case[:2]), *case[2:])
    assert_array_equal(slot, expected.slot)
    assert_array_equal(kept, expected.kept)
    assert_array_equal(y, expected.y)


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
@given(redundant_cases())
def test_redundant_merge(case: RedundantCase) -> None:
    expected = oracle.redundant_merge(*case)
    assume(expected.margin > MARGIN)
    y, out_size, slot, kept = ops.redundant_merge(*tensors(*case[:4]), *case[4:])
    assert_array_equal(slot, expected.slot)
    assert_array_equal(kept, expected.kept)
    assert_allclose(out_size, expected.out_size, rtol=SINGLE)
    assert_allclose(y, expected.y, atol=SINGLE * scale(case.x))


@FAST
@given(redundant_cases())
def test_redundant_merge_in_double_precision_is_the_oracle(case: RedundantCase) -> None:
    x, size, metric, score = (a.astype(np.float64) for a in case[:4])
    expected = oracle.redundant_merge(x, size, metric, score, *case[4:])
    assume(expected.margin > 1e-12)
    y, *_ = ops.redundant_merge(*tensors(x, size, metric, score), *case[4:])
    assert_allclose(y, expected.y, atol=1e-14 * scale(case.x))


@FAST
@given(energy_cases())
def test_token_energy(case: EnergyCase) -> None:
    expected = oracle.token_energy(*case)
    assume(expected.margin > MARGIN)
    found = ops.token_energy(*tensors(*case[:2]), *case[2:])
    assert found.dtype == torch.float32
    assert_allclose(found, expected.score, atol=4 * SINGLE)


@FAST
@given(energy_cases(dtype="float16"))
def test_token_energy_half(case: EnergyCase) -> None:
    """Computed in float32: as near as that to the energy of the keys as they come."""
    expected = oracle.token_energy(*case)
    assume(expected.margin > MARGIN)
    found = ops.token_energy(*tensors(*case[:2]), *case[2:])
    assert found.dtype == torch.float32
    assert_allclose(found, expected.score, atol=4 * SINGLE)


@FAST
@given(energy_cases())
def test_token_energy_in_double_precision_is_the_oracle(case: EnergyCase) -> None:
    metric = case.metric.astype(np.float64)
    expected = oracle.token_energy(metric, *case[1:])
    assume(expected.margin > 1e-12)
    found = ops.token_energy(*tensors(metric, case.size), *case[2:])
    assert_allclose(found, expected.score, atol=1e-14)


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
@given(soft_cases())
def test_soft_merge(case: SoftCase) -> None:
    expected = oracle.soft_merge(*case)
    assume(expected.margin > 1e-6)
    y, slot, kept = ops.soft_merge(*tensors(*case[:3]), case.protected)
    assert_array_equal(slot, expected.slot)
    assert_array_equal(kept, expected.kept)
    assert_allclose(y, expected.y, rtol=SINGLE, atol=8 * SINGLE * scale(case.values))


@FAST
@given(soft_cases())
def test_soft_merge_in_double_precision_is_the_oracle(case: SoftCase) -> None:
    x, values, logits = (array.astype(np.float64) for array in case[:3])
    y, *_ = ops.soft_merge(*tensors(x, values, logits), case.protected)
    expected = oracle.soft_merge(x, values, logits, case.protected)
    assert_allclose(y, expected.y, rtol=1e-14, atol=1e-13 * scale(case.values))


@FAST
@given(prune_merge_cases())
def test_prune_merge(case: PruneMergeCase) -> None:
    expected = oracle.prune_merge(*case)
    assume(expected.margin > MARGIN)
    found = ops.prune_merge(*tensors(*case[:3]), *case[3:])
    assert_array_equal(found[2], expected.slot)
    assert_array_equal(found[3], expected.kept)
    assert_allclose(found[1], expected.out_size, atol=4 * SINGLE * scale(case.size))
    assert_allclose(found[0], expected.y, atol=SINGLE * scale(case.x))


@FAST
@given(prune_merge_cases(dtype="float16"))
def test_prune_merge_half(case: PruneMergeCase) -> None:
    expected = oracle.prune_merge(*case)
    assume(expected.margin > MARGIN)
    y, size, slot, _ = ops.prune_merge(*tensors(*case[:3]), *case[3:])
    assert y.dtype == torch.float16
    assert size.dtype == torch.float32
    assert_array_equal(slot, expected.slot)
    assert_allclose(y, expected.y, atol=HALF * scale(case.x))


@FAST
@given(prune_merge_cases())
def test_prune_merge_in_double_precision_is_the_oracle(case: PruneMergeCase) -> None:
    x, size, score = (a.astype(np.float64) for a in case[:3])
    expected = oracle.prune_merge(x, size, score, *case[3:])
    assume(expected.margin > 1e-12)
    y, out_size, *_ = ops.prune_merge(*tensors(x, size, score), *case[3:])
    assert_allclose(y, expected.y, atol=1e-14 * scale(case.x))
    assert_allclose(out_size, expected.out_size, atol=1e-13 * scale(case.size))


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


@FAST
@given(
    seed=st.integers(0, 2**31),
    row=st.integers(0, 2),
    bias=st.sampled_from((None, (1, 1, 1, 6), (2, 1, 3, 6), (1, 2, 1, 6), (3, 6), "bool")),
)
def test_class_attention(seed: int, row: int, bias: Any) -> None:
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 2, 3, 4)), rng.standard_normal((2, 2, 6, 4))
    given_bias = None
    if bias == "bool":
        given_bias = rng.random((2, 1, 3, 6)) < 0.7
        given_bias[..., 0] = True
    elif bias is not None:
        given_bias = rng.standard_normal(bias)
    found = ops.class_attention(
        *tensors(q, k), None if given_bias is None else torch.from_numpy(given_bias), 0.3, row
    )
    assert_allclose(found, oracle.class_attention(q, k, given_bias, 0.3, row), atol=1e-14)


@FAST
@given(seed=st.integers(0, 2**31), rest=st.sampled_from(((), (3,), (2, 3))))
def test_gather(seed: int, rest: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    x, index = rng.standard_normal((2, 5, *rest)), rng.integers(0, 5, (2, 7))
    assert_array_equal(ops.gather_tokens(*tensors(x, index)), oracle.gather_tokens(x, index))


@FAST
@given(seed=st.integers(0, 2**31))
def test_restore(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, aside = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 6, 3))
    slot = rng.integers(-1, 4, (2, 6))
    found = ops.restore_tokens(*tensors(x, slot, aside))
    assert_array_equal(found, oracle.restore_tokens(x, slot, aside))


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


def example(name: str) -> tuple[Any, ...]:
    x, size, metric = torch.randn(2, 9, 4), torch.rand(2, 9) + 0.5, torch.randn(2, 2, 9, 3)
    q, k = torch.randn(2, 2, 9, 3), torch.randn(2, 2, 9, 3)
    score, index, slot = (
        torch.rand(2, 9),
        torch.randint(0, 9, (2, 4)),
        torch.randint(-1, 9, (2, 12)),
    )
    cases: dict[str, tuple[Any, ...]] = {
        "bipartite_merge": (x, size, metric, 6, 1, True),
        "class_attention": (q, k, torch.randn(2, 1, 1, 9), 0.5, 0),
        "token_energy": (metric, size, 0.4, 1),
        "keep_tokens": (x, score, 6, 1, True),
        "prune_merge": (x, size, score, 7, 5, 1),
        "gather_tokens": (x, index),
        "restore_tokens": (x, slot, torch.randn(2, 12, 4)),
    }
    return cases[name]


NAMES = (
    "bipartite_merge",
    "class_attention",
    "token_energy",
    "keep_tokens",
    "prune_merge",
    "gather_tokens",
    "restore_tokens",
)


@pytest.mark.parametrize("name", NAMES)
def test_torch_accepts_the_registration(name: str) -> None:
    arguments = tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in example(name)
    )
    opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    arguments = [
        a.double().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in example(name)
    ]

    def function(*inputs: Any) -> Any:
        results = getattr(ops, name)(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r for r in results if r.is_floating_point())

    assert torch.autograd.gradcheck(function, tuple(arguments))


def test_counts_may_be_symbols() -> None:
    class Shorten(torch.nn.Module):
        def forward(self, x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor) -> Any:
            y, size, _, _ = ops.bipartite_merge(x, size, metric, x.shape[1] - 2, 1, True)
            y, size, *_ = ops.prune_merge(y, size, size, y.shape[1] - 1, y.shape[1] - 2, 1)
            return ops.keep_tokens(y, size, y.shape[1] - 1, 1, False)[0]

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=8)
    axes = ({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch, 2: tokens})
    example = (torch.randn(2, 9, 4), torch.ones(2, 9), torch.randn(2, 2, 9, 3))
    program = torch.export.export(Shorten(), example, dynamic_shapes=axes).run_decompositions({})
    larger = (torch.randn(3, 14, 4), torch.ones(3, 14), torch.randn(3, 2, 14, 3))
    assert program.module()(*larger).shape == (3, 9, 4)


@pytest.mark.parametrize("protected", PROTECTED)
def test_counts_that_cannot_be_reached_are_refused_with_the_range(protected: int) -> None:
    tokens = 11
    x, size, metric = torch.randn(1, tokens, 2), torch.ones(1, tokens), torch.randn(1, 1, tokens, 2)
    least = fewest(tokens, protected)
    for wrong in (least - 1, tokens + 1):
        with pytest.raises(ValueError, match=f"from {least} to {tokens} are possible"):
            ops.bipartite_merge(x, size, metric, wrong, protected, True)
    for wrong in (protected, tokens + 1):
        with pytest.raises(ValueError, match=f"from {protected + 1} to {tokens} are possible"):
            ops.keep_tokens(x, size, wrong, protected, True)
    for pruned, keep in ((8, 9), (tokens + 1, 9), (8, protected), (protected - 1, protected - 1)):
        with pytest.raises(ValueError, match=f"<= keep <= pruned <= {tokens} is possible"):
            ops.prune_merge(x, size, size, pruned, keep, protected)


def test_other_nonsense_is_refused_with_the_reason() -> None:
    q = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="row 4 is not one of the 4 queries"):
        ops.class_attention(q, q, None, 1.0, 4)
    with pytest.raises(ValueError, match="a prefix of 5 is none of 4 tokens"):
        ops.token_energy(q, torch.ones(1, 4), 0.5, 5)
    with pytest.raises(ValueError, match="x has rank 1"):
        ops.gather_tokens(torch.randn(3), torch.zeros(1, 2, dtype=torch.int64))
