"""Function bodies, native and Triton kernels equal the definitions; bodies have every axis symbolic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from numpy.testing import assert_allclose, assert_array_equal

import thresher.kernels.ops  # noqa: F401
from tests.kernels import oracle
from tests.kernels.back_ends import EVERYWHERE, demand, run
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
from tests.kernels.test_definitions import HALF, MARGIN, SINGLE, scale, tensors
from thresher.kernels.registry import OPERATORS

ops = torch.ops.thresher
# Triton's interpreter is slow; test_triton.py has a few cases for every day.
BACK_ENDS = (
    *EVERYWHERE,
    "cuda",
    pytest.param("triton", marks=pytest.mark.slow),
)
FAST = settings(
    max_examples=50, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)  # fmt: skip


def wherever(name: str) -> pytest.MarkDecorator:
    """The mark of a test on every back end that has kernels of an operator."""

    def has(back_end: Any) -> bool:
        kind = back_end if isinstance(back_end, str) else back_end.values[0]
        return bool(getattr(OPERATORS[name], kind, True))

    return pytest.mark.parametrize("back_end", list(filter(has, BACK_ENDS)))


everywhere = pytest.mark.parametrize("back_end", BACK_ENDS)
bodies = pytest.mark.parametrize("back_end", BACK_ENDS[:2])  # operators without kernels
BY_SCORE = {"redundant_merge": "RedundantMerge", "split_merge": "SplitMerge"}
by_score = pytest.mark.parametrize("name", BY_SCORE)


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "back_end" in request.fixturenames:
        demand(request.getfixturevalue("back_end"))


def merge_on(back_end: str, case: MergeCase) -> list[Any]:
    x, size, metric, keep, protected, by_index = case
    arguments = {"x": x, "size": size, "metric": metric, "keep": np.array(keep)}
    name = "BipartiteMerge" if by_index else "RankedBipartiteMerge"
    y, out_size, kept, slot = run(back_end, name, arguments, protected=protected)
    return [y, out_size, slot, kept]


def keep_on(back_end: str, case: KeepCase) -> list[Any]:
    x, score, keep, protected, fuse = case
    arguments = {"x": x, "score": score, "keep": np.array(keep)}
    name = "FuseTokens" if fuse else "KeepTokens"
    y, kept, slot = run(back_end, name, arguments, protected=protected)
    return [y, slot, kept]


def diverse_on(back_end: str, case: DiverseCase) -> list[Any]:
    x, size, keep, protected = case
    arguments = {"x": x, "size": size, "keep": np.array(keep)}
    y, kept, slot = run(back_end, "SelectDiverse", arguments, protected=protected)
    return [y, slot, kept]


def by_score_on(back_end: str, name: str, case: RedundantCase) -> list[Any]:
    x, size, metric, score, keep, protected = case
    arguments = {"x": x, "size": size, "metric": metric, "score": score, "keep": np.array(keep)}
    y, out_size, kept, slot = run(back_end, BY_SCORE[name], arguments, protected=protected)
    return [y, out_size, slot, kept]


def energy_on(back_end: str, case: EnergyCase) -> Any:
    arguments = {"metric": case.metric, "size": case.size}
    (score,) = run(back_end, "TokenEnergy", arguments, margin=case.margin, protected=case.protected)
    assert score.dtype == np.float32
    return score


def soft_on(back_end: str, case: SoftCase) -> list[Any]:
    arguments = {"x": case.x, "values": case.values, "logits": case.logits}
    y, kept, slot = run(back_end, "SoftMerge", arguments, protected=case.protected)
    return [y, slot, kept]


def prune_merge_on(back_end: str, case: PruneMergeCase) -> list[Any]:
    x, size, score, pruned, keep, protected = case
    counts = {"pruned": np.array(pruned), "keep": np.array(keep)}
    arguments = {"x": x, "size": size, "score": score, **counts}
    y, out_size, kept, slot = run(back_end, "PruneMerge", arguments, protected=protected)
    return [y, out_size, slot, kept]


@everywhere
@FAST
@given(case=merge_cases())
def test_merge(back_end: str, case: MergeCase) -> None:
    expected = oracle.bipartite_merge(*case)
    assume(expected.margin > MARGIN)
    y, size, slot, kept = merge_on(back_end, case)
    assert_array_equal(slot, expected.slot)
    assert_array_equal(kept, expected.kept)
    assert_allclose(size, expected.out_size, rtol=SINGLE)
    assert_allclose(y, expected.y, atol=SINGLE * scale(case.x))


@everywhere
@FAST
@given(case=merge_cases(dtype="float16"))
def test_merge_half(back_end: str, case: MergeCase) -> None:
    expected = oracle.bipartite_merge(*case)
    assume(expected.margin > MARGIN)
    y, size, slot, _ = merge_on(back_end, case)
    assert y.dtype == np.float16
    assert_array_equal(slot, expected.slot)
    assert_allclose(size, expected.out_size, rtol=SINGLE)
    assert_allclose(y, expected.y, atol=HALF * scale(case.x))


@everywhere
@FAST
@given(case=keep_cases())
def test_keep(back_end: str, case: KeepCase) -> None:
    y, slot, kept = keep_on(back_end, case)
    expected = oracle.keep_tokens(*case)
    assert_array_equal(slot, expected[1])
    assert_array_equal(kept, expected[2])
    assert_allclose(y, expected[0], atol=8 * SINGLE * scale(expected[0]))


@everywhere
@FAST
@given(case=keep_cases(dtype="float16"))
def test_keep_half(back_end: str, case: KeepCase) -> None:
    y, slot, _ = keep_on(back_end, case)
    expected = oracle.keep_tokens(*case)
    assert y.dtype == np.float16
    assert_array_equal(slot, expected[1])
    assert_allclose(y, expected[0], atol=HALF * scale(expected[0]))


@wherever("SelectDiverse")
@FAST
@given(case=diverse_cases())
def test_select_diverse(back_end: str, case: DiverseCase) -> None:
    expected = oracle.select_diverse(*case)
    assume(expected.margin > MARGIN)
    y, slot, kept = diverse_on(back_end, case)
    assert_array_equal(slot, expected.slot)
    assert_array_equal(kept, expected.kept)
    assert_array_equal(y, expected.y)


@wherever("SelectDiverse")
@FAST
@given(case=diverse_cases(dtype="float16"))
def test_select_diverse_half(back_end: str, case: DiverseCase) -> None:
    expected = oracle.select_diverse(*case)
    assume(expected.margin > MARGIN)
    y, slot, _ = diverse_on(back_end, case)
    assert y.dtype == np.float16
    assert_array_equal(slot, expected.slot)
    assert_array_equal(y, expected.y)


@by_score
@wherever("SplitMerge")
@FAST
@given(case=redundant_cases())
def test_merge_by_score(back_end: str, name: str, case: RedundantCase) -> None:
    expected = getattr(oracle, name)(*case)
    assume(expected.margin > MARGIN)
    y, size, slot, kept = by_score_on(back_end, name, case)
    assert_array_equal(slot, expected.slot)
    assert_array_equal(kept, expected.kept)
    assert_allclose(size, expected.out_size, rtol=SINGLE)
    assert_allclose(y, expected.y, atol=SINGLE * scale(case.x))


@by_score
@wherever("SplitMerge")
@FAST
@given(case=redundant_cases(dtype="float16"))
def test_merge_by_score_half(back_end: str, name: str, case: RedundantCase) -> None:
    expected = getattr(oracle, name)(*case)
    assume(expected.margin > MARGIN)
    y, _, slot, _ = by_score_on(back_end, name, case)
    assert y.dtype == np.float16
    assert_array_equal(slot, expected.slot)
    assert_allclose(y, expected.y, atol=HALF * scale(case.x))


@wherever("TokenEnergy")
@FAST
@given(case=energy_cases())
def test_token_energy(back_end: str, case: EnergyCase) -> None:
    expected = oracle.token_energy(*case)
    assume(expected.margin > MARGIN)
    assert_allclose(energy_on(back_end, case), expected.score, atol=4 * SINGLE)


@wherever("TokenEnergy")
@FAST
@given(case=energy_cases(dtype="float16"))
def test_token_energy_half(back_end: str, case: EnergyCase) -> None:
    expected = oracle.token_energy(*case)
    assume(expected.margin > MARGIN)
    assert_allclose(energy_on(back_end, case), expected.score, atol=4 * SINGLE)


@wherever("TokenEnergy")
def test_energies_of_a_key_that_is_no_number_are_none(back_end: str) -> None:
    case = EnergyCase(np.ones((2, 1, 20, 3), np.float32), np.ones((2, 20), np.float32), 0.5, 1)
    case.metric[0, 0, 7, 1] = np.nan
    score = energy_on(back_end, case)
    assert np.isnan(score[0]).all()
    assert_allclose(score[1], 1, atol=SINGLE)


@bodies
@FAST
@given(case=soft_cases())
def test_soft_merge(back_end: str, case: SoftCase) -> None:
    expected = oracle.soft_merge(*case)
    assume(expected.margin > 1e-6)
    y, slot, kept = soft_on(back_end, case)
    assert_array_equal(slot, expected.slot)
    assert_array_equal(kept, expected.kept)
    assert_allclose(y, expected.y, rtol=SINGLE, atol=8 * SINGLE * scale(case.values))


@bodies
@FAST
@given(case=soft_cases(dtype="float16"))
def test_soft_merge_half(back_end: str, case: SoftCase) -> None:
    expected = oracle.soft_merge(*case)
    assume(expected.margin > 1e-6)
    y, slot, _ = soft_on(back_end, case)
    assert y.dtype == np.float16
    assert_array_equal(slot, expected.slot)
    assert_allclose(y, expected.y, rtol=HALF, atol=HALF * scale(case.values))


@everywhere
@FAST
@given(case=prune_merge_cases())
def test_prune_merge(back_end: str, case: PruneMergeCase) -> None:
    expected = oracle.prune_merge(*case)
    assume(expected.margin > MARGIN)
    y, size, slot, kept = prune_merge_on(back_end, case)
    assert_array_equal(slot, expected.slot)
    assert_array_equal(kept, expected.kept)
    assert_allclose(size, expected.out_size, atol=4 * SINGLE * scale(case.size))
    assert_allclose(y, expected.y, atol=SINGLE * scale(case.x))


@everywhere
@FAST
@given(case=prune_merge_cases(dtype="float16"))
def test_prune_merge_half(back_end: str, case: PruneMergeCase) -> None:
    expected = oracle.prune_merge(*case)
    assume(expected.margin > MARGIN)
    y, size, slot, _ = prune_merge_on(back_end, case)
    assert y.dtype == np.float16
    assert_array_equal(slot, expected.slot)
    assert_allclose(size, expected.out_size, atol=4 * SINGLE * scale(case.size))
    assert_allclose(y, expected.y, atol=HALF * scale(case.x))


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(), (1, 1, 1, 9), (3, 2, 1, 9), (3, 1, 1, 9)])
def test_class_attention(back_end: str, dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((3, 2, n, 8)).astype(dtype) for n in (4, 9))
    bias = rng.standard_normal(shape).astype(np.float32) if shape else np.zeros((), np.float32)
    (score,) = run(back_end, "ClassAttention", {"q": q, "k": k, "bias": bias}, scale=0.3, row=2)
    assert score.dtype == np.float32
    assert_allclose(score, oracle.class_attention(q, k, bias, 0.3, 2), atol=8 * SINGLE)


@everywhere
@pytest.mark.parametrize("rest", [(), (4,), (2, 4)])
def test_gather(back_end: str, rest: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, index = rng.standard_normal((3, 5, *rest)).astype(np.float32), rng.integers(0, 5, (3, 7))
    (y,) = run(back_end, "GatherTokens", {"x": x, "index": index})
    assert_array_equal(y, oracle.gather_tokens(x, index))


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_restore(back_end: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, aside = (rng.standard_normal((3, n, 5)).astype(dtype) for n in (4, 7))
    slot = rng.integers(-1, 4, (3, 7))
    (y,) = run(back_end, "RestoreTokens", {"x": x, "slot": slot, "aside": aside})
    assert_array_equal(y, oracle.restore_tokens(x, slot, aside))


@everywhere
def test_huge_sizes_do_not_overflow_in_half_precision(back_end: str) -> None:
    x = np.full((1, 2, 3), 60000, np.float16)
    size = np.array([[3.0, 2000.0]], np.float32)
    case = MergeCase(x, size, np.ones((1, 1, 2, 4), np.float16), 1, 0, True)
    y, total, *_ = merge_on(back_end, case)
    assert_array_equal(y, x[:, :1])
    assert_array_equal(total, [[2003.0]])
    expected = ops.bipartite_merge(*tensors(*case[:3]), 1, 0, True)
    assert_array_equal(expected[0], y)
