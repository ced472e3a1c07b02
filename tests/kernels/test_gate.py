"""AdaptiveGate: the definition, its body on each back end, its native kernel, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from torch.library import opcheck

import thresher.kernels.ops  # noqa: F401
from tests.kernels.back_ends import EVERY_DAY, EVERYWHERE, demand, library, run, through_casts
from tests.kernels.cases import Array

NAME = "AdaptiveGate"
adaptive_gate = torch.ops.thresher.adaptive_gate
everywhere = pytest.mark.parametrize("back_end", EVERYWHERE)
FAST = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)  # fmt: skip


class Case(NamedTuple):
    """Operands in the operator's order."""

    x: Array
    gate: Array
    bias: Array

    def torch(self, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        x, *weights = map(torch.from_numpy, self)
        return [x.to(dtype), *weights]


@st.composite
def cases(draw: st.DrawFn, dtype: str = "float32") -> Case:
    """Small whole numbers: logits are exact in every type, and many of them are equal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    batch, tokens = draw(st.integers(1, 3)), draw(st.sampled_from((1, 5, 8, 19)))
    choices, width = draw(st.integers(1, 9)), draw(st.sampled_from((1, 7, 16, 40)))
    x = rng.integers(-2, 3, (batch, tokens, width)).astype(dtype)
    gate = rng.integers(-1, 2, (choices, width)).astype(np.float32)
    return Case(x, gate, rng.integers(-2, 3, choices).astype(np.float32))


def logits(case: Case) -> Array:
    """Token by token and choice by choice, in float64: ``[B, N, M]``."""
    found = np.zeros((*case.x.shape[:2], len(case.bias)))
    for b, t, m in np.ndindex(found.shape):
        products = (float(v) * float(w) for v, w in zip(case.x[b, t], case.gate[m], strict=True))
        found[b, t, m] = sum(products) + float(case.bias[m])
    return found


def oracle(case: Case) -> Array:
    """The first of the largest."""
    found = [
        max(range(len(row)), key=row.__getitem__)
        for row in logits(case).reshape(-1, len(case.bias))
    ]
    return np.array(found).reshape(case.x.shape[:2])


def on(back_end: str, case: Case) -> Array:
    demand(back_end)
    (k,) = run(back_end, NAME, case._asdict())
    return k


@FAST
@given(cases())
def test_the_definition_is_the_oracle(case: Case) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = adaptive_gate(*case.torch(dtype))
        assert found.dtype == torch.int64
        assert_array_equal(found, oracle(case))


@everywhere
@FAST
@given(case=cases())
def test_the_body(back_end: str, case: Case) -> None:
    found = on(back_end, case)
    assert found.dtype == np.int64
    assert_array_equal(found, oracle(case))


@everywhere
@FAST
@given(case=cases(dtype="float16"))
def test_the_body_in_half_precision(back_end: str, case: Case) -> None:
    assert_array_equal(on(back_end, case), oracle(case))


@pytest.mark.parametrize("element", ["float16", "bfloat16", "float32", "float64"])
def test_the_native_kernel_in_every_type(element: str) -> None:
    """Of any numbers, wherever no rounding decides."""
    rng = np.random.default_rng(0)
    x, gate, bias = (rng.standard_normal(size) for size in ((2, 101, 387), (5, 387), 5))
    rounded = torch.from_numpy(x).to(getattr(torch, element)).float().numpy()
    case = Case(rounded, gate.astype(np.float32), bias.astype(np.float32))
    threads = partial(through_casts, NAME, element)
    one, four = (threads(threads=n).run(None, case._asdict())[0] for n in (1, 4))
    assert_array_equal(one, four)
    exact = np.sort(logits(case), -1)
    clear = exact[..., -1] - exact[..., -2] > 1e-4
    assert clear.mean() > 0.9
    assert_array_equal(one[clear], oracle(case)[clear])
    alone = case._replace(x=case.x[1:, 17:18])  # rows have no neighbours
    assert_array_equal(threads(threads=1).run(None, alone._asdict())[0], one[1:, 17:18])


def test_sums_are_wider_than_half_precision() -> None:
    """4,096 + 1 is no number of float16, nor is 1 + 2^-11."""
    x = np.array([[[64.0, 1.0]]], np.float16)
    rows = [[64.0, 0.0], [64.0, 1.0], [64.0, 1 + 2.0**-11]]
    case = Case(x, np.array(rows, np.float32), np.zeros(3, np.float32))
    assert adaptive_gate(*case.torch(torch.float16)).item() == 2
    for back_end in EVERY_DAY:
        assert on(back_end, case).item() == 2


def test_no_tokens_and_no_numbers_are_no_crash() -> None:
    library()
    weights = np.ones((3, 4), np.float32), np.zeros(3, np.float32)
    assert on("native", Case(np.zeros((2, 0, 4), np.float32), *weights)).shape == (2, 0)
    spoilt = np.full((1, 9, 4), np.nan, np.float32)
    spoilt[0, ::2, 1] = np.inf
    assert np.isin(on("native", Case(spoilt, *weights)), range(3)).all()
    empty = Case(
        np.zeros((1, 2, 0), np.float32), weights[0][:, :0], np.array([0, 2, 1], np.float32)
    )
    assert_array_equal(on("native", empty), 1)


def test_registration_and_symbols() -> None:
    x, gate, bias = torch.randn(2, 5, 4), torch.randn(3, 4), torch.randn(3)
    opcheck(adaptive_gate.default, (x, gate, bias))
    opcheck(adaptive_gate.default, (x.requires_grad_(), gate.requires_grad_(), bias))


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        ({"x": (5, 4)}, r"x is \[B, N, C\], not \[5, 4\]"),
        ({"gate": (3, 5)}, r"gate is \[M, D\] of x \[B, N, D\], not \[3, 5\]"),
        ({"gate": (0, 4), "bias": (0,)}, r"gate is \[M, D\] of x \[B, N, D\], not \[0, 4\]"),
        ({"bias": (2,)}, r"bias is \[M\] for gate \[M, D\], not \[2\]"),
    ],
)
def test_hostile_shapes_are_an_error(spoilt: dict[str, tuple[int, ...]], said: str) -> None:
    sizes: dict[str, Any] = {"x": (1, 5, 4), "gate": (3, 4), "bias": (3,)} | spoilt
    given = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    library()
    with pytest.raises(Exception, match=f"{NAME}: {said}"):
        through_casts(NAME, "float32").run(None, given)
    with pytest.raises(ValueError, match=r"adaptive_gate wants x \[B, N, D\], gate \[M, D\] and"):
        adaptive_gate(*map(torch.from_numpy, given.values()))
