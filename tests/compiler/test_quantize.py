"""Linear layers in eight bits, against arithmetic written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from tests.runtime.toys import transformer
from thresher.compiler.errors import RefusedError
from thresher.compiler.lowering.quantize import prepare, quantize, quantized_weight
from thresher.runtime.backends.onnx_runtime import session_options

Doubles = NDArray[np.float64]
RNG = np.random.default_rng(0)
FIRST = RNG.standard_normal((6, 5)).astype(np.float32)
SECOND = RNG.standard_normal((3, 5)).astype(np.float32)
BIAS = RNG.standard_normal(3).astype(np.float32)
LIMITS = {"x": 2.0, "h_lifted": 1.5}
MLP = """<ir_version: 10, opset_import: ["":20]>
mlp (float[batch, 6] x) => (float[batch, 3] y) {
  p = MatMul(x, first)
  h = Relu(p)
  y = Gemm<transB=1>(h, second, bias)
}"""


def mlp(text: str = MLP) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    for name, array in (("first", FIRST), ("second", SECOND), ("bias", BIAS)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def run(model: ir.Model, **feeds: NDArray[Any]) -> NDArray[Any]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), session_options(1))
    (found,) = session.run(None, feeds)
    return np.asarray(found)


def by_hand(values: NDArray[Any], limit: float | Doubles) -> Doubles:
    """To the nearest of 256 equal steps, of which 127 are above zero and reach ``limit``."""
    step = np.asarray(limit, np.float64) / 127
    return np.clip(np.rint(values.astype(np.float64) / step), -128, 127) * step


def test_both_forms_of_a_linear_layer_match_arithmetic_by_hand() -> None:
    model = mlp()
    assert [value.name for value in prepare(model)] == ["x", "h_lifted"]
    assert quantize(model, LIMITS) == 2
    x = RNG.standard_normal((7, 6)).astype(np.float32) * 1.5  # some are beyond the limit
    first = by_hand(FIRST, np.abs(FIRST).max(axis=0))
    second = by_hand(SECOND, np.abs(SECOND).max(axis=1, keepdims=True))
    hidden = np.maximum(by_hand(x, LIMITS["x"]) @ first, 0)
    expected = by_hand(hidden, LIMITS["h_lifted"]) @ second.T + BIAS
    np.testing.assert_allclose(run(model, x=x), expected, rtol=1e-5, atol=1e-5)
    assert model.graph.outputs[0].name == "y"
    stored = {n: v.dtype for n, v in model.graph.initializers.items() if len(v.shape or ()) == 2}
    assert set(stored.values()) == {ir.DataType.INT8}, "float weights are not kept beside"
    with pytest.raises(RefusedError):  # a second run finds nothing
        prepare(model)


def test_one_input_is_rounded_once_and_everything_else_stays_float() -> None:
    model = ir.from_proto(transformer(keep=5))
    body = ir.to_proto(model).functions[0].SerializeToString()
    watched = [str(value.name) for value in prepare(model)]
    assert quantize(model, dict.fromkeys(watched, 3.0)) == 3
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == 3
    assert kinds.count("DequantizeLinear") == 3 + 2  # two layers share a weight
    for node in model.graph:
        if node.op_type in ("LayerNormalization", "Gelu", "Add", "Keep", "ReduceMean"):
            makers = {value.producer() for value in node.inputs if value is not None}
            assert not {m.op_type for m in makers if m} & {"QuantizeLinear", "DequantizeLinear"}
    rounding = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    assert rounding.metadata_props["thresher.module"] == "blocks.0.mlp"
    assert ir.to_proto(model).functions[0].SerializeToString() == body


@pytest.mark.parametrize(
    "layer",
    [
        "y = MatMul(x, x)",
        "y = Gemm<alpha=2.0>(x, first)",
        "w = Relu(first) y = MatMul(x, w)",
        "y = MatMul(first, x)",
    ],
)
def test_what_is_no_linear_layer_is_left_and_a_model_without_any_refused(layer: str) -> None:
    model = mlp(f"""<ir_version: 10, opset_import: ["":20]>
        m (float[6, 6] x) => (float[a, b] y) {{ {layer} }}""")
    with pytest.raises(RefusedError, match="no product with a float32 weight"):
        prepare(model)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        elements=st.one_of(
            st.floats(-(2.0**100), 2.0**100, width=32), st.sampled_from([0.0, 1e-45, -1.0])
        ),
    )
)
def test_weights_are_the_nearest_steps_of_their_channel(weight: NDArray[np.float32]) -> None:
    rounded, scales = quantized_weight(weight)
    assert rounded.dtype == np.int8
    assert scales.dtype == np.float32
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    assert np.abs(rounded.astype(int)).max() <= 127
    restored = rounded * scales.astype(np.float64)
    assert (np.abs(restored - weight) <= 0.5001 * scales.astype(np.float64)).all()
    zero = np.abs(weight).max(axis=0) == 0
    assert (rounded[:, zero] == 0).all()
    normal = np.abs(weight).max(axis=0) > 1e-30
    assert (np.abs(rounded[:, normal].astype(int)).max(axis=0, initial=127) == 127).all()
    np.testing.assert_array_equal(np.sign(rounded) * np.sign(weight) >= 0, True)
