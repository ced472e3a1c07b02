"""The torch definitions equal the loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import thresher.kernels.ops  # noqa: F401
from tests.kernels import oracle
from tests.kernels.cases import (
    DiverseCase,
    EnergyCase,
    KeepCase,
    MergeCase,
    PruneMergeCase,
    RedundantCase,
    SoftCase,
    diverse_cases,
    energy_cases,
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

by_score = pytest.mark.parametrize("name", ["redundant_merge", "split_merge"])


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


@by_score
@FAST
@given(case=redundant_cases())
def test_merge_by_score(name: str, case: RedundantCase) -> None:
    expected = getattr(oracle, name)(*case)
    assume(expected.margin > MARGIN)
    y, out_size, slot, kept = getattr(ops, name)(*tensors(*case[:4]), *case[4:])
    assert_array_equal(slot, expected.slot)
    assert_array_equal(kept, expected.kept)
    assert_allclose(out_size, expected.out_size, rtol=SINGLE)
    assert_allclose(y, expected.y, atol=SINGLE * scale(case.x))


@by_score
@FAST
@given(case=redundant_cases())
def test_merge_by_score_in_double_precision_is_the_oracle(name: str, case: RedundantCase) -> None:
    x, size, metric, score = (a.astype(np.float64) for a in case[:4])
    expected = getattr(oracle, name)(x, size, metric, score, *case[4:])
    assume(expected.margin > 1e-12)
    y, *_ = getattr(ops, name)(*tensors(x, size, metric, score), *case[4:])
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
