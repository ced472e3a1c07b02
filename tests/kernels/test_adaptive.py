"""AdaptiveMLP: the definition, its body on each back end, its gradients, and how it is lowered."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch.library import opcheck

import thresher.kernels.ops  # noqa: F401
from tests.kernels.back_ends import run
from tests.kernels.cases import Array
from thresher.compiler.errors import RefusedError
from thresher.compiler.lowering.onnx_export import _common
from thresher.kernels.registry import DOMAIN, OPERATORS

OPERATOR = OPERATORS["AdaptiveMLP"]
adaptive_mlp = torch.ops.thresher.adaptive_mlp
SINGLE, HALF = 2.0**-20, 2.0**-8  # sums of some dozens of terms
everywhere = pytest.mark.parametrize("back_end", ["onnxruntime", "openvino"])
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
FAST = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)  # fmt: skip


class Case(NamedTuple):
    """Arguments of ``adaptive_mlp``, in order."""

    x: Array
    k: Array
    w1: Array
    b1: Array
    w2: Array
    activation: str


def made(
    learners: int, shape: tuple[int, int], k: Array, activation: str, seed: int, dtype: str
) -> Case:
    rng, width, hidden = np.random.default_rng(seed), 4, 3
    sizes = [
        (*shape, width),
        (learners, width, hidden),
        (learners, hidden),
        (learners, hidden, width),
    ]
    x, w1, b1, w2 = (rng.standard_normal(size).astype(dtype) for size in sizes)
    return Case(x, k.reshape(shape).astype(np.int64), w1, b1, w2, activation)


@st.composite
def cases(draw: st.DrawFn, dtype: str = "float32") -> Case:
    learners, seed = draw(st.sampled_from((1, 2, 4))), draw(st.integers(0, 2**31))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    k = np.random.default_rng(seed).integers(0, learners + 1, batch * tokens)
    kind = draw(st.sampled_from(("any", "none", "all", "rising", "falling", "same")))
    k = {
        "any": k, "none": k * 0, "all": k * 0 + learners, "rising": np.sort(k),
        "falling": -np.sort(-k), "same": k * 0 + k[0],
    }[kind]  # fmt: skip
    return made(learners, (batch, tokens), k, draw(st.sampled_from(ACTIVATIONS)), seed, dtype)


def act(name: str, value: float) -> float:
    if name == "gelu":
        return value * (1 + math.erf(value / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
        return value * (1 + math.tanh(inner)) / 2
    if name == "quick_gelu":
        return value / (1 + math.exp(-1.702 * value))
    return max(value, 0.0) if name == "relu" else value / (1 + math.exp(-value))


def oracle(case: Case) -> Array:
    """Token by token and neuron by neuron, in float64."""
    x, k, w1, b1, w2, name = case
    y = np.zeros(x.shape)
    for b, t in np.ndindex(k.shape):
        for n in range(int(k[b, t])):
            for h in range(w1.shape[2]):
                total = float(b1[n, h])
                total += sum(float(x[b, t, d]) * float(w1[n, d, h]) for d in range(x.shape[2]))
                y[b, t] += act(name, total) * w2[n, h].astype(np.float64)
    return y


def torch_of(case: Case, dtype: Any = None) -> list[torch.Tensor]:
    x, k, w1, b1, w2, _ = case
    return [
        torch.from_numpy(v if v is k else v.astype(dtype or v.dtype)) for v in (x, k, w1, b1, w2)
    ]


@FAST
@given(cases())
def test_the_definition_in_double_precision_is_the_oracle(case: Case) -> None:
    found = adaptive_mlp(*torch_of(case, np.float64), case.activation)
    assert_allclose(found, oracle(case), atol=1e-12)


def on(back_end: str, case: Case) -> Array:
    pytest.importorskip(back_end)
    arguments = dict(zip(OPERATOR.inputs, case[:5], strict=True))
    attributes = {"learners": case.w1.shape[0], "activation": case.activation}
    (y,) = run(back_end, OPERATOR.name, arguments, **attributes)
    return y


@everywhere
@FAST
@given(case=cases())
def test_the_body(back_end: str, case: Case) -> None:
    found = on(back_end, case)
    assert found.shape == case.x.shape
    assert_allclose(found, oracle(case), atol=SINGLE * 64)
    assert_array_equal(found[case.k == 0], 0)


@everywhere
@FAST
@given(case=cases(dtype="float16"))
def test_the_body_in_half_precision(back_end: str, case: Case) -> None:
    found = on(back_end, case)
    assert found.dtype == np.float16
    assert_allclose(found, oracle(case), atol=HALF * 64)


def test_gradients_and_shapes() -> None:
    case = made(3, (2, 3), np.array([0, 1, 2, 3, 3, 1]), "gelu", 0, "float64")
    x, k, *weights = torch_of(case)
    floats = [value.requires_grad_() for value in (x, *weights)]
    assert torch.autograd.gradcheck(lambda x, *w: adaptive_mlp(x, k, *w, "gelu"), floats)
    opcheck(adaptive_mlp.default, (x, k, *weights, "gelu"))


def test_what_does_not_fit_is_refused() -> None:
    x, k, w1, b1, w2 = torch_of(made(2, (1, 3), np.zeros(3), "relu", 0, "float32"))
    with pytest.raises(ValueError, match=r"x \[B, N, D\].* not \[1, 3, 3\]"):
        adaptive_mlp(x[..., :3], k, w1, b1, w2, "relu")
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        adaptive_mlp(x, k, w1, b1, w2, "tanh")


def test_one_model_holds_one_kind() -> None:
    nodes = [
        ir.node(
            OPERATOR.name, [], {"learners": n, "activation": "relu"}, domain=DOMAIN, name=f"n{n}"
        )
        for n in (2, 4)
    ]
    assert _common(nodes[:1]) == {"learners": 2, "activation": "relu"}
    with pytest.raises(RefusedError, match=r"n4 and n2 are AdaptiveMLP with .* convert the layers"):
        _common(nodes)
