"""Sparse gated feed-forward networks: every face equals plain loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import thresher.kernels.ops  # noqa: F401
from tests.kernels import oracle
from tests.kernels.back_ends import run
from tests.kernels.sparse import (
    FAST,
    LEADING,
    NAMES,
    ONNX,
    UNIT,
    T,
    W,
    X,
    everywhere,
    gated,
    installed,  # noqa: F401  (a fixture for all tests here)
)
from tests.kernels.test_definitions import tensors

ops = torch.ops.thresher


@everywhere
@FAST
@given(
    lead=st.sampled_from(LEADING),
    sizes=st.sampled_from(((1, 1, 1), (16, 32, 16), (21, 50, 37))),
    level=st.sampled_from((-1.0, 0.0, 0.3, 1.0, 1e9)),
    activation=st.sampled_from(sorted(NAMES)),
    dtype=st.sampled_from(("float32", "float16")),
    seed=st.integers(0, 2**31),
)
def test_gated_ffn(
    back_end: str, lead: tuple[int, ...], sizes: tuple[int, int, int], level: float,
    activation: str, dtype: str, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    width, neurons, columns = sizes
    shapes = {
        "x": (*lead, width),
        "gate": (width, neurons),
        "up": (neurons, width),
        "down": (neurons, columns),
    }
    scale = {"x": 1.0, "gate": width**-0.5, "up": width**-0.5, "down": neurons**-0.5}
    given_ = {n: (rng.standard_normal(s) * scale[n]).astype(dtype) for n, s in shapes.items()}
    threshold = (rng.random(neurons) * level).astype(np.float32)
    weights = given_["x"], given_["gate"], given_["up"], given_["down"]
    expected = oracle.sparse_gated_ffn(*weights, threshold, activation, 8)
    # No neuron may lie so near to its threshold that rounding decides.
    eps = 8 * UNIT[dtype]
    for nudge in (1 - 8 * eps, 1 + 8 * eps):
        moved = oracle.sparse_gated_ffn(*weights, threshold * nudge, activation, 8)
        assume((moved == expected).all())
    found = gated(back_end, activation, 8, given_ | {"threshold": threshold})
    assert found.dtype == np.dtype(dtype)
    assert_allclose(found, expected, atol=16 * eps, rtol=4 * eps)


@pytest.mark.parametrize("back_end", ONNX)
@pytest.mark.parametrize("activation", sorted(NAMES))
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_gated_ffn_with_weights_in_bfloat16(back_end: str, activation: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, 21)).astype(np.float32)
    weights = [
        torch.randn(s, generator=torch.manual_seed(0)) / 5 for s in ((21, 50), (50, 21), (50, 37))
    ]
    narrow = [weight.bfloat16() for weight in weights]
    threshold = np.full(50, 0.1, np.float32)
    gate, up, down = (weight.float().numpy() for weight in narrow)
    expected = oracle.sparse_gated_ffn(x, gate, up, down, threshold, activation, 8)
    found = ops.sparse_gated_ffn(*tensors(x), *narrow, *tensors(threshold), activation, 8)
    assert_allclose(found, expected, atol=1e-5)
    given_ = dict(zip(("x", "gate_bf16", "up_bf16", "down_bf16"), (x, gate, up, down), strict=True))
    name = f"{NAMES[activation]}Bf16"
    (y,) = run(back_end, name, given_ | {"threshold": threshold}, most_tokens=8)
    assert_allclose(y, expected, atol=1e-5)


@everywhere
def test_nan_keeps_its_neuron(back_end: str) -> None:
    rng = np.random.default_rng(0)
    given_ = {
        n: rng.standard_normal(s).astype(np.float32)
        for n, s in (("x", (2, 5)), ("gate", (5, 9)), ("up", (9, 5)), ("down", (9, 4)))
    }
    given_["gate"][:, 2] = np.nan
    found = gated(back_end, "silu", 8, given_ | {"threshold": np.full(9, 1e9, np.float32)})
    assert np.isnan(found).all()


@pytest.mark.parametrize("changed", ["gate", "up", "down", "threshold"])
def test_hostile_shapes_of_the_ffn_are_errors(changed: str) -> None:
    arguments = {"x": X, "gate": W, "up": W.T, "down": W.T, "threshold": T[:5]}
    arguments[changed] = np.ascontiguousarray(arguments[changed][1:])
    with pytest.raises(Exception, match=r"SparseSwiGLU: \w+ is .*, not \["):
        run("native", "SparseSwiGLU", arguments, most_tokens=8)
    with pytest.raises(ValueError, match="sparse_gated_ffn: gate is"):
        ops.sparse_gated_ffn(*tensors(*arguments.values()), "silu", 8)
