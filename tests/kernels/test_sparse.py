"""Sparse linears: every face equals plain loops in float64, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch.library import opcheck

import thresher.kernels.ops  # noqa: F401
from tests.kernels import oracle
from tests.kernels.back_ends import library, run
from tests.kernels.sparse import (
    FAST,
    LEADING,
    ONNX,
    T,
    W,
    X,
    close,
    everywhere,
    gated,
    installed,  # noqa: F401  (a fixture for all tests here)
    layer,
    linear,
)
from tests.kernels.test_definitions import tensors

ops = torch.ops.thresher


@everywhere
@FAST
@given(
    lead=st.sampled_from(LEADING),
    width=st.sampled_from((1, 7, 16, 45)),
    columns=st.sampled_from((1, 15, 16, 150)),
    sparsity=st.sampled_from((0.0, 0.2, 0.5, 0.9, 1.0)),
    dtype=st.sampled_from(("float32", "float16")),
    seed=st.integers(0, 2**31),
)
def test_linear(back_end: str, dtype: str, **case: Any) -> None:
    made = layer(**case, dtype=dtype)
    close(linear(back_end, made), made)
    if back_end in ("onnxruntime", "native"):
        close(linear(back_end, made, "CompactSparseLinear"), made)


@pytest.mark.parametrize("lead", LEADING)
def test_linear_in_double_precision(lead: tuple[int, ...]) -> None:
    made = layer(lead, 33, 40, 0.6, "float64")
    for back_end in ("torch", "onnxruntime", "native"):
        close(linear(back_end, made), made)


@pytest.mark.parametrize("back_end", ONNX)
@pytest.mark.parametrize("tokens", [1, 2, 8, 9])
def test_weights_in_bfloat16(back_end: str, tokens: int) -> None:
    case = layer((tokens,), 50, 37, 0.5, "float32")
    x, weight, threshold = tensors(*case[:3])
    narrow = weight.bfloat16()
    case = case._replace(weight=narrow.float().numpy())
    close(linear(back_end, case, "SparseLinearBf16"), case)
    close(ops.sparse_linear(x, narrow, threshold, 8).numpy(), case)


@everywhere
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_threshold_zero_is_dense_and_infinity_drops_all(back_end: str, tokens: int) -> None:
    case = layer((tokens,), 64, 96, 0.0, "float32")._replace(most_tokens=9)
    case.x[:, ::5] = 0
    zero, below, infinite = (
        linear(back_end, case._replace(threshold=np.full(64, t, np.float32)))
        for t in (0, -np.inf, np.inf)
    )
    if back_end == "torch":
        assert_array_equal(zero, (torch.from_numpy(case.x) @ torch.from_numpy(case.weight)).numpy())
    close(zero, case)
    close(below, case)
    assert_array_equal(infinite, np.zeros_like(infinite))


@everywhere
def test_with_more_tokens_nothing_is_dropped(back_end: str) -> None:
    for tokens in (3, 4):
        for most in (-1, 0, 3, 2**62):
            case = layer((tokens,), 20, 20, 0.9, "float32")._replace(most_tokens=most)
            close(linear(back_end, case), case)


@everywhere
def test_many_tokens_are_thresholded_too_where_that_is_wanted(back_end: str) -> None:
    case = layer((5, 14), 20, 33, 0.6, "float32")._replace(most_tokens=70)
    close(linear(back_end, case), case)
    rng = np.random.default_rng(0)
    given_ = {
        n: rng.standard_normal(s).astype(np.float32) / 4
        for n, s in (("x", (70, 16)), ("gate", (16, 32)), ("up", (32, 16)), ("down", (32, 9)))
    } | {"threshold": np.full(32, 0.05, np.float32)}
    x, gate, up, down, threshold = given_.values()
    expected = oracle.sparse_gated_ffn(x, gate, up, down, threshold, "silu", 70)
    assert_allclose(gated(back_end, "silu", 70, given_), expected, atol=1e-5)


@everywhere
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_nan_is_kept(back_end: str, tokens: int) -> None:
    case = layer((tokens,), 40, 33, 0.95, "float32")._replace(most_tokens=9)
    case.x[-1, 3] = np.nan
    found = linear(back_end, case)
    assert np.isnan(found[-1]).all()
    assert not np.isnan(found[:-1]).any()


@everywhere
def test_no_tokens(back_end: str) -> None:
    for name in ("SparseLinear", "CompactSparseLinear"):
        if name != "SparseLinear" and back_end == "openvino":
            continue
        assert linear(back_end, layer((0, 2), 8, 5, 0.5, "float32"), name).shape == (0, 2, 5)


def test_every_size_of_rows_and_parts() -> None:
    """Several panels, splits by rows, a rest of rows and of columns; threads change nothing."""
    import onnxruntime as ort

    from tests.kernels.back_ends import model
    from thresher.runtime.backends.onnx_runtime import session_options

    for tokens, width, columns in ((1, 1203, 9001), (2, 700, 4501), (3, 999, 2113), (8, 515, 1031)):
        case = layer((tokens,), width, columns, 0.55, "float32")
        close(linear("native", case), case)
        made = model("SparseLinear", (2, 2, 1), "float32", (("most_tokens", 8),))
        feeds = {"x": case.x, "weight": case.weight, "threshold": case.threshold}
        results = [
            ort.InferenceSession(
                made.SerializeToString(), session_options(threads, library()),
                providers=["CPUExecutionProvider"],
            ).run(None, feeds)[0]
            for threads in (1, 4)
        ]  # fmt: skip
        assert_array_equal(*results)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": W[:5]}, r"weight is \[I, O\] for x \[..., I\], not \[5, 5\]"),
        ({"threshold": T[:5]}, r"threshold is \[I\] for x \[..., I\], not \[5\]"),
        ({"x": np.float32(1)}, r"x is \[..., I\], not \[\]"),
        ({"weight": T}, r"weight is \[I, O\]"),
    ],
)
def test_hostile_shapes_are_errors(change: dict[str, Any], said: str) -> None:
    arguments = {"x": X, "weight": W, "threshold": T} | change
    arguments = {n: np.asarray(v) for n, v in arguments.items()}
    with pytest.raises(Exception, match=f"SparseLinear: {said}"):
        run("native", "SparseLinear", arguments, most_tokens=8)


def test_definitions_refuse_what_does_not_fit() -> None:
    x, w, t = tensors(X, W, T)
    with pytest.raises(ValueError, match="x has 6 channels, weight 5 and threshold 6"):
        ops.sparse_linear(x, w[:5], t, 8)
    with pytest.raises(ValueError, match=r"weight torch.float16 \(torch.float32 as x"):
        ops.sparse_linear(x, w.half(), t, 8)
    with pytest.raises(ValueError, match="activation tanh is not silu, gelu, relu"):
        ops.sparse_gated_ffn(x, w, w.T, w.T, t[:5], "tanh", 8)


def test_gradients_and_shapes() -> None:
    x, w = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 6), (6, 5)))
    g, u, d = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((6, 7), (7, 6), (7, 3)))  # fmt: skip
    t = torch.full((7,), 0.4)
    assert torch.autograd.gradcheck(lambda x, w: ops.sparse_linear(x, w, t[:6], 8), (x, w))
    assert torch.autograd.gradcheck(
        lambda *all_: ops.sparse_gated_ffn(*all_, t, "gelu", 8), (x, g, u, d)
    )
    opcheck(ops.sparse_linear.default, (x, w, t[:6], 8))
    opcheck(ops.sparse_gated_ffn.default, (x, g, u, d, t, "silu", 8))
