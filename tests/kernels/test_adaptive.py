"""AdaptiveMLP: the definition, its body on each back end, its gradients, and how it is lowered."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch.library import opcheck

import thresher.kernels.ops  # noqa: F401
from tests.kernels import triton_back_end
from tests.kernels.back_ends import run
from tests.kernels.cases import Array
from thresher.kernels.registry import OPERATORS, Operator, called

PLAIN, GATED = OPERATORS["AdaptiveMLP"], OPERATORS["AdaptiveGatedMLP"]
ours = torch.ops.thresher
SINGLE, HALF = 2.0**-20, 2.0**-8  # sums of some dozens of terms
everywhere = pytest.mark.parametrize("back_end", ["onnxruntime", "openvino", "native"])
ACTIVATIONS = ("gelu", "gelu_tanh", "identity", "quick_gelu", "relu", "silu")
FAST = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)  # fmt: skip
FEW = settings(FAST, max_examples=4)


class Case(NamedTuple):
    """Tokens, counts, the weights of an operator by name, and an activation."""

    x: Array
    k: Array
    weights: dict[str, Array]
    activation: str

    @property
    def operator(self) -> Operator:
        return GATED if "v" in self.weights else PLAIN

    @property
    def arguments(self) -> dict[str, Array]:
        """By name, in the operator's order."""
        given = {"x": self.x, "k": self.k, **self.weights}
        return {name: given[name] for name in self.operator.inputs}

    def torch(self, dtype: Any = None) -> list[torch.Tensor]:
        return [
            torch.from_numpy(v if name == "k" else v.astype(dtype or v.dtype))
            for name, v in self.arguments.items()
        ]


def made(
    learners: int, shape: tuple[int, int], k: Array, activation: str, seed: int, dtype: str,
    gated: bool = False,
) -> Case:  # fmt: skip
    rng, width, hidden = np.random.default_rng(seed), 4, 3
    up, bias = (learners, width, hidden), (learners, hidden)
    sizes = {"w1": up, "b1": bias, "w2": (learners, hidden, width), "b2": (width,)}
    sizes |= {"v": up, "c": bias} if gated else {}
    x = rng.standard_normal((*shape, width)).astype(dtype)
    weights = {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}
    return Case(x, k.reshape(shape).astype(np.int64), weights, activation)


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
    activation, gated = draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())
    return made(learners, (batch, tokens), k, activation, seed, dtype, gated)


def act(name: str, value: float) -> float:
    if name == "gelu":
        return value * (1 + math.erf(value / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
        return value * (1 + math.tanh(inner)) / 2
    if name == "identity":
        return value
    if name == "quick_gelu":
        return value / (1 + math.exp(-1.702 * value))
    return max(value, 0.0) if name == "relu" else value / (1 + math.exp(-value))


def oracle(case: Case) -> Array:
    """Token by token and neuron by neuron, in float64."""
    x, k, weights, name = case
    y = np.zeros(x.shape) + weights["b2"].astype(np.float64)

    def row(matrix: str, bias: str, token: Array, n: int, h: int) -> float:
        products = (
            float(t) * float(w) for t, w in zip(token, weights[matrix][n, :, h], strict=True)
        )
        return float(weights[bias][n, h]) + sum(products)

    for b, t in np.ndindex(k.shape):
        for n in range(int(k[b, t])):
            for h in range(weights["b1"].shape[1]):
                value = act(name, row("w1", "b1", x[b, t], n, h))
                value *= row("v", "c", x[b, t], n, h) if "v" in weights else 1.0
                y[b, t] += value * weights["w2"][n, h].astype(np.float64)
    return y


def alone(case: Case, which: Array) -> Array:
    """What so many tokens without learners get."""
    return np.broadcast_to(case.weights["b2"], (int(which.sum()), case.x.shape[2]))


def call(case: Case, dtype: Any = None) -> torch.Tensor:
    found: torch.Tensor = getattr(ours, case.operator.torch_name)(
        *case.torch(dtype), case.activation
    )
    return found


@FAST
@given(cases())
def test_the_definition_in_double_precision_is_the_oracle(case: Case) -> None:
    assert_allclose(call(case, np.float64), oracle(case), atol=1e-12)


def on(back_end: str, case: Case) -> Array:
    if back_end != "native":
        pytest.importorskip(back_end)
    attributes = {"learners": len(case.weights["b1"]), "activation": case.activation}
    (y,) = run(back_end, case.operator.name, case.arguments, **attributes)
    return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_the_triton_kernels(gated: bool, activation: str) -> None:
    """Several blocks of tokens, counts below 0 and above L, and dead tokens in between."""
    k = np.random.default_rng(2).integers(-1, 5, 150)
    case = made(3, (2, 75), k, activation, 0, "float32", gated)
    (y,) = triton_back_end.run(case.operator.name, case.arguments, activation=activation)
    assert_allclose(y, call(case, np.float64), atol=SINGLE * 64)
    assert_array_equal(y[case.k <= 0], alone(case, case.k <= 0))


@FEW
@given(case=cases(dtype="float16"))
def test_the_triton_kernels_in_half_precision(case: Case) -> None:
    (y,) = triton_back_end.run(case.operator.name, case.arguments, activation=case.activation)
    assert y.dtype == np.float16
    assert_allclose(y, oracle(case), atol=HALF * 64)


def test_the_sort_is_stable() -> None:
    device = triton_back_end.device()
    from thresher.kernels.gpu.learners import sort_by_count

    k = np.random.default_rng(3).integers(-1, 6, (2, 1000)).clip(0, 4)
    order, count = sort_by_count(torch.from_numpy(k).to(device), 4)
    assert_array_equal(order.cpu(), np.argsort(-k, kind="stable", axis=1))
    assert_array_equal(count.cpu(), [[(row > n).sum() for n in range(4)] for row in k])


@everywhere
@FAST
@given(case=cases())
def test_the_body(back_end: str, case: Case) -> None:
    found = on(back_end, case)
    assert found.shape == case.x.shape
    assert_allclose(found, oracle(case), atol=SINGLE * 64)
    assert_array_equal(found[case.k == 0], alone(case, case.k == 0))


@everywhere
@FAST
@given(case=cases(dtype="float16"))
def test_the_body_in_half_precision(back_end: str, case: Case) -> None:
    found = on(back_end, case)
    assert found.dtype == np.float16
    assert_allclose(found, oracle(case), atol=HALF * 64)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_and_shapes(gated: bool) -> None:
    case = made(3, (2, 3), np.array([0, 1, 2, 3, 3, 1]), "gelu", 0, "float64", gated)
    operator = getattr(ours, case.operator.torch_name)
    x, k, *weights = case.torch()
    floats = [value.requires_grad_() for value in (x, *weights)]
    assert torch.autograd.gradcheck(lambda x, *w: operator(x, k, *w, "gelu"), floats)
    opcheck(operator.default, (x, k, *weights, "gelu"))


def test_what_does_not_fit_is_refused() -> None:
    x, k, *weights = made(2, (1, 3), np.zeros(3), "relu", 0, "float32").torch()
    with pytest.raises(ValueError, match=r"x \[B, N, D\].* not \[1, 3, 3\]"):
        ours.adaptive_mlp(x[..., :3], k, *weights, "relu")
    with pytest.raises(ValueError, match=r"adaptive_mlp wants .* and b2 \[D\], not .*\[3\] with"):
        ours.adaptive_mlp(x, k, *weights[:3], weights[3][:3], "relu")
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        ours.adaptive_mlp(x, k, *weights, "tanh")
    x, k, w1, b1, v, *rest = made(2, (1, 3), np.zeros(3), "relu", 0, "float32", True).torch()
    with pytest.raises(ValueError, match=r"v and c as w1 \[2, 4, 3\]"):
        ours.adaptive_gated_mlp(x, k, w1, b1, v[..., :2], *rest, "relu")


def test_each_kind_has_a_body_of_its_own() -> None:
    for count in (2, 4):
        attributes = {"learners": count, "activation": "relu"}
        kind = PLAIN.kind(attributes)
        assert kind == f"AdaptiveMLP_{count}_relu"
        assert called(kind) is called(PLAIN.name) is PLAIN
        written = PLAIN.function(attributes=attributes, name=kind)
        assert written.name == kind
        assert sum(node.op_type == "Relu" for node in written.node) == count
