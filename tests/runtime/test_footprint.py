"""The memory estimate, by hand on a graph where each number can be counted."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx.parser
import pytest

from tests.compiler.toys import TOKENS, WIDTH, Toy, traced
from thresher.compiler.pipeline import optimize
from thresher.compiler.recipe import load_recipe
from thresher.runtime import export
from thresher.runtime.backends.cpu import OnnxRuntimeCpu
from thresher.runtime.footprint import footprint, largest
from thresher.runtime.manifest import TensorInfo

GRAPH = """<ir_version: 10, opset_import: ["":20]>
g (float[batch, 8] x) => (float[batch, 4] z)
<float[8, 4] w = {0}, float[batch, 8] a, float16[batch, 8] h, float[2, "4*batch"] v, float[batch, 8] b,
 float[batch, 8] c>
{ a = Relu(x) v = Reshape(a, s) b = Reshape(v, t) h = Cast<to=10>(b) c = Cast<to=1>(h) z = MatMul(c, w) }
"""


def graph() -> onnx.ModelProto:
    model = onnx.parser.parse_model(GRAPH.replace("= {0}", f"= {{{', '.join(['0'] * 32)}}}"))
    for name in ("s", "t"):
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [2], [1, 1])
        model.graph.initializer.append(tensor)
    return model


def test_the_peak_is_the_most_that_is_alive_at_once() -> None:
    found = footprint(graph(), {"batch": 10})
    assert found is not None
    assert found.weights == 8 * 4 * 4 + 2 * 2 * 8
    x, a, h, c, z = 320, 320, 160, 320, 160  # v and b lie in the memory of a
    steps = [x + a, x + a + h, x + h + c, x + c + z]
    assert found.activations == max(steps) == 800
    assert "at batch 10" in str(found)


def test_a_shape_that_the_file_does_not_say_gives_no_estimate() -> None:
    assert footprint(graph(), {}) is None
    model = graph()
    del model.graph.value_info[0]
    assert footprint(model, {"batch": 10}) is None


def test_the_largest_sizes_count_and_the_usual_ones_where_there_is_no_bound() -> None:
    specs = (TensorInfo(name="x", dtype="float32", shape=("batch", "tokens", 8)),)
    assert largest(specs, {"batch": (1, 32)}, {"batch": 8}) == {"batch": 32, "tokens": 64}
    assert largest(specs, {}, {"batch": 8, "tokens": 5}) == {"batch": 8, "tokens": 5}
    assert largest(specs, {"tokens": (100, None)}, {}) == {"batch": 1, "tokens": 100}
    tied = (TensorInfo(name="mask", dtype="int64", shape=("batch", "past + sequence")),)
    assert largest(tied, {}, {}) == {"batch": 1}


def test_a_reduced_model_of_any_length_is_estimated_by_its_arithmetic(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the batch is twice the activations; what does not fit is told before it is built."""
    program = optimize(
        traced(Toy(pool="mean"), dynamic=True), load_recipe("tome", ["keep=0.7", "layers=1"])
    )
    found = []
    for batch in (4, 8):
        shape = [f"x={batch}x{TOKENS}x{WIDTH}"]
        engine = export(program, tmp_path / f"e{batch}", threads=1, check=False, shapes=shape)
        assert engine.manifest.estimate is not None
        found.append(engine.manifest.estimate["activations"])
    assert 1.9 < found[1] / found[0] <= 2
    monkeypatch.setattr(OnnxRuntimeCpu, "free_memory", lambda self: 1000)
    monkeypatch.setattr(logging.getLogger("thresher"), "propagate", True)
    export(program, tmp_path / "e", threads=1, check=False, shapes=shape)
    assert "will need about" in caplog.text
    assert "--shape" in caplog.text
