"""Cases, tolerances and back ends for the tests of the operators of activation sparsity."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import thresher.kernels.ops  # noqa: F401
from tests.kernels import oracle, triton_back_end
from tests.kernels.back_ends import Array, library, run
from tests.kernels.test_definitions import tensors

ops = torch.ops.thresher
ONNX = ("onnxruntime", "openvino", "native")
NAMES = {"silu": "SparseSwiGLU", "gelu": "SparseGeGLU", "relu": "SparseReGLU"}
LEADING = [(1,), (1, 1), (2,), (3,), (2, 4), (9,), (8, 1, 9)]
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11}  # half a last place
FAST = settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    if "back_end" in request.fixturenames:
        back_end = request.getfixturevalue("back_end")
        if back_end == "native":
            library()
        elif back_end == "triton":
            triton_back_end.device()
        elif back_end != "torch":
            pytest.importorskip(back_end)


everywhere = pytest.mark.parametrize("back_end", ["torch", "triton", *ONNX])


class Linear(NamedTuple):
    """Arguments of ``sparse_linear``."""

    x: Array
    weight: Array
    threshold: Array
    most_tokens: int


def layer(
    lead: tuple[int, ...], width: int, columns: int, sparsity: float, dtype: str, seed: int = 0
) -> Linear:
    """Random tokens, of which about ``sparsity`` lie below their channel's threshold, some on it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*lead, width)).astype(dtype)
    threshold = np.abs(rng.standard_normal(width)).astype(np.float32)
    threshold *= np.float32(-np.log(max(1 - sparsity, 1e-9)) * 2)
    if sparsity == 0:
        threshold[:] = -1
    on = rng.random(x.shape) < 0.1  # `>` is not `>=`
    limits = np.broadcast_to(threshold.astype(dtype), x.shape)
    threshold = threshold.astype(dtype).astype(np.float32)
    x = np.where(on & (limits > 0), limits * rng.choice([-1, 1], x.shape), x).astype(dtype)
    weight = rng.standard_normal((width, columns)).astype(dtype)
    return Linear(x, weight, threshold, 8)


def linear(back_end: str, case: Linear, name: str = "SparseLinear") -> Array:
    arguments = case._asdict()
    most = arguments.pop("most_tokens")
    if back_end == "torch":
        y: Array = ops.sparse_linear(*tensors(*case[:3]), most).numpy()
        return y
    return np.array(run(back_end, name, arguments, most_tokens=most)[0])


def close(found: Array, case: Linear) -> None:
    """Within the bound of sums in float32 or wider, and a rounding of the result."""
    expected = oracle.sparse_linear(*case)
    size = np.abs(case.x.astype(float)) @ np.abs(case.weight.astype(float))
    wide = UNIT["float64" if case.x.dtype == np.float64 else "float32"]
    bound = wide * (case.x.shape[-1] + 1) * size + 2 * UNIT[str(case.x.dtype)] * np.abs(expected)
    assert found.shape == expected.shape
    assert found.dtype == case.x.dtype
    assert (np.abs(found - expected) <= bound + 2.0**-25).all()  # that is of float16's subnormals


def gated(back_end: str, activation: str, most: int, arguments: dict[str, Array]) -> Array:
    if back_end == "torch":
        y: Array = ops.sparse_gated_ffn(*tensors(*arguments.values()), activation, most).numpy()
        return y
    return np.array(run(back_end, NAMES[activation], arguments, most_tokens=most)[0])


X, W, T = np.ones((2, 6), np.float32), np.ones((6, 5), np.float32), np.ones(6, np.float32)
