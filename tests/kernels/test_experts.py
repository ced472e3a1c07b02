"""ExpertMLP: the definition, its body on each back end, its gradients, and how it is lowered."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch.library import opcheck

import thresher.kernels.ops  # noqa: F401
from tests.kernels.back_ends import demand, run
from tests.kernels.cases import Array
from tests.kernels.test_adaptive import act
from thresher.kernels.registry import OPERATORS

NAME = "ExpertMLP"
expert_mlp = torch.ops.thresher.expert_mlp
SINGLE, HALF = 2.0**-20, 2.0**-8  # sums of some dozens of terms
everywhere = pytest.mark.parametrize("back_end", ["onnxruntime", "openvino", "native", "triton"])
FAST = settings(
    max_examples=20, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)  # fmt: skip


class Case(NamedTuple):
    """Operands in the operator's order, and an activation."""

    x: Array
    run: Array
    w1: Array
    b1: Array
    w2: Array
    b2: Array
    activation: str

    def torch(self, dtype: Any = None) -> list[torch.Tensor]:
        given = (v if v.dtype == bool else v.astype(dtype or v.dtype) for v in self[:6])
        return [torch.from_numpy(value) for value in given]


def made(run: Array, activation: str, seed: int, dtype: str) -> Case:
    """A case whose tokens run what ``run`` ``[B, N, E]`` says."""
    rng, width, hidden = np.random.default_rng(seed), 4, 3
    experts = run.shape[2]
    sizes = (*run.shape[:2], width), (experts, width, hidden), (experts, hidden)
    x, w1, b1, w2, b2 = (
        rng.standard_normal(size).astype(dtype)
        for size in (*sizes, (experts, hidden, width), (width,))
    )
    return Case(x, run, w1, b1, w2, b2, activation)


@st.composite
def cases(draw: st.DrawFn, dtype: str = "float32") -> Case:
    experts, seed = draw(st.sampled_from((1, 3, 4))), draw(st.integers(0, 2**31))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 6)), experts
    share = draw(st.sampled_from((0.0, 0.2, 0.5, 1.0)))  # none, some, all
    run = np.random.default_rng(seed).random(shape) < share
    return made(run, draw(st.sampled_from(("gelu", "relu", "silu"))), seed, dtype)


def oracle(case: Case) -> Array:
    """Token by token, expert by expert and neuron by neuron, in float64."""
    y = np.zeros(case.x.shape) + case.b2.astype(np.float64)
    for b, t, e in np.ndindex(case.run.shape):
        if case.run[b, t, e]:
            for h in range(case.b1.shape[1]):
                products = (
                    float(v) * float(w) for v, w in zip(case.x[b, t], case.w1[e, :, h], strict=True)
                )
                value = act(case.activation, sum(products) + float(case.b1[e, h]))
                y[b, t] += value * case.w2[e, h].astype(np.float64)
    return y


@FAST
@given(cases())
def test_the_definition_in_double_precision_is_the_oracle(case: Case) -> None:
    found = expert_mlp(*case.torch(np.float64), case.activation)
    assert_allclose(found, oracle(case), atol=1e-12)


def on(back_end: str, case: Case) -> Array:
    demand(back_end)
    operands = dict(zip(OPERATORS[NAME].inputs, case[:6], strict=True))
    (y,) = run(back_end, NAME, operands, experts=len(case.b1), activation=case.activation)
    return y


@everywhere
@FAST
@given(case=cases())
def test_the_body(back_end: str, case: Case) -> None:
    found = on(back_end, case)
    assert_allclose(found, oracle(case), atol=SINGLE * 64)
    nobody = found[~case.run.any(-1)]
    assert_array_equal(nobody, np.broadcast_to(case.b2, nobody.shape))


@everywhere
@FAST
@given(case=cases(dtype="float16"))
def test_the_body_in_half_precision(back_end: str, case: Case) -> None:
    found = on(back_end, case)
    assert found.dtype == np.float16
    assert_allclose(found, oracle(case), atol=HALF * 64)


def test_gradients_and_shapes() -> None:
    run = np.random.default_rng(1).random((2, 3, 3)) < 0.5
    x, chosen, *weights = made(run, "gelu", 0, "float64").torch()
    floats = [value.requires_grad_() for value in (x, *weights)]
    assert torch.autograd.gradcheck(lambda x, *w: expert_mlp(x, chosen, *w, "gelu"), floats)
    opcheck(expert_mlp.default, (x, chosen, *weights, "gelu"))


def test_what_does_not_fit_is_refused() -> None:
    x, run, *weights = made(np.ones((1, 3, 2), bool), "relu", 0, "float32").torch()
    with pytest.raises(ValueError, match=r"run \[B, N, L\].* not \[1, 3, 4\], \[1, 3, 1\]"):
        expert_mlp(x, run[..., :1], *weights, "relu")
    with pytest.raises(ValueError, match=r"booleans.* with torch\.float32"):
        expert_mlp(x, run.float(), *weights, "relu")
    with pytest.raises(ValueError, match=r"b2 \[D\], not .*\[1\] with"):
        expert_mlp(x, run, *weights[:3], weights[3][:1], "relu")
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        expert_mlp(x, run, *weights, "tanh")
