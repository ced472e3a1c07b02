"""Operators of activation sparsity: every face equals plain loops in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch.library import opcheck

import thresher.kernels.ops  # noqa: F401
from tests.kernels import oracle, triton_back_end
from tests.kernels.back_ends import Array, library, run
from tests.kernels.test_definitions import tensors
from thresher.compiler.lowering import branch_prompts, to_onnx
from thresher.compiler.program import SourceInfo
from thresher.compiler.trace import trace
from thresher.runtime import Engine, export

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
def _installed(request: pytest.FixtureRequest) -> None:
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


def gated(back_end: str, activation: str, most: int, arguments: dict[str, Array]) -> Array:
    if back_end == "torch":
        y: Array = ops.sparse_gated_ffn(*tensors(*arguments.values()), activation, most).numpy()
        return y
    return np.array(run(back_end, NAMES[activation], arguments, most_tokens=most)[0])


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


X, W, T = np.ones((2, 6), np.float32), np.ones((6, 5), np.float32), np.ones(6, np.float32)


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


@pytest.mark.parametrize("changed", ["gate", "up", "down", "threshold"])
def test_hostile_shapes_of_the_ffn_are_errors(changed: str) -> None:
    arguments = {"x": X, "gate": W, "up": W.T, "down": W.T, "threshold": T[:5]}
    arguments[changed] = np.ascontiguousarray(arguments[changed][1:])
    with pytest.raises(Exception, match=r"SparseSwiGLU: \w+ is .*, not \["):
        run("native", "SparseSwiGLU", arguments, most_tokens=8)
    with pytest.raises(ValueError, match="sparse_gated_ffn: gate is"):
        ops.sparse_gated_ffn(*tensors(*arguments.values()), "silu", 8)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those of branches included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


class Layers(torch.nn.Module):
    """All of the operators in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.gate, self.up, self.down = (
            torch.nn.Parameter(torch.randn(size) / 4)
            for size in ((8, 8), (8, 32), (32, 8), (32, 8))
        )
        self.narrow = torch.nn.Parameter(torch.randn(8, 8).bfloat16())
        self.register_buffer("limits", torch.full((32,), 0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        limits = self.get_buffer("limits")
        x = ops.sparse_linear(x, self.wide, limits[:8], 6)
        x = ops.sparse_linear(x, self.wide, limits[:8], 6, True)
        x = ops.sparse_linear(x, self.narrow, limits[:8], 6)
        y: torch.Tensor = ops.sparse_gated_ffn(x, self.gate, self.up, self.down, limits, "silu", 6)
        return y


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("fp16", 2e-2)])
def test_engines_hold_each_as_one_node(
    precision: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Layers().eval()
    program = trace(
        model,
        {"x": torch.zeros(2, 3, 8)},
        dynamic={"x": {0: "batch"}},
        info=SourceInfo("layers", "random"),
    )
    export(program, tmp_path / "layers", precision=precision, threads=1)
    written = onnx.load(tmp_path / "layers" / "model.onnx")
    found = [n.op_type for n in nodes_of(written.graph) if n.domain == "thresher"]
    narrow = "SparseLinearBf16" if precision == "fp32" else "SparseLinear"
    assert found == ["SparseLinear", "CompactSparseLinear", narrow, "SparseSwiGLU"]
    assert sum(n.op_type == "If" for n in nodes_of(written.graph)) == 1  # for all of them
    for switch in ("off", "on"):
        if switch == "on":
            library()
        monkeypatch.setenv("THRESHER_KERNELS", switch)
        with Engine.load(tmp_path / "layers", threads=1) as engine:
            assert engine.details["kernels"] == ("native" if switch == "on" else "function bodies")
            for batch in (1, 2, 3):
                x = torch.randn(batch, 3, 8)
                (y,) = engine.run({"x": x.numpy()}).values()
                # In half precision what lies on its threshold may fall on either side.
                assert np.abs(y - model(x).detach().numpy()).mean() < most


def test_where_the_number_of_tokens_is_fixed_nothing_branches() -> None:
    program = trace(
        Layers().eval(),
        {"x": torch.zeros(2, 3, 8)},
        dynamic={},
        info=SourceInfo("layers", "random"),
    )
    model = to_onnx(program)
    before = [node.op_type for node in model.graph]
    branch_prompts(model)
    assert [node.op_type for node in model.graph] == before
    assert "SparseSwiGLU" in before


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
