"""The memory estimate, by hand on a graph where each number can be counted."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx.parser
import pytest
import torch

import thresher.kernels.ops  # noqa: F401
from tests.compiler.toys import TOKENS, WIDTH, Toy, traced
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import SourceInfo
from thresher.compiler.recipe import load_recipe
from thresher.compiler.trace import trace
from thresher.runtime import export
from thresher.runtime.backends import backend
from thresher.runtime.backends.cpu import OnnxRuntimeCpu
from thresher.runtime.footprint import footprint, largest
from thresher.runtime.manifest import TensorInfo
from thresher.runtime.planning import outlook

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


BRANCHED = """<ir_version: 10, opset_import: ["":20]>
g (float[batch, 4] x, bool few) => (float[batch, 4] z)
<bfloat16[4, 4] w = {0}, float[4, 4] v = {0}, float[4] b = {0}, float[batch, 4] y, float[batch, 4] q>
{ y = If (few) <then_branch = t () => (float[batch, 4] t1) { wt = CastLike(w, x) t0 = MatMul(x, wt) t1 = Add(t0, b) },
                else_branch = e () => (float[batch, 4] e1) { we = CastLike(w, x) e0 = MatMul(x, we) e1 = Add(e0, b) }>
  q = MatMul(y, v) z = Relu(q) }
"""


def test_what_both_branches_multiply_with_is_held_once_more() -> None:
    """Packed in the type of the product; the bias is not packed, v is packed in its own place."""
    zeros = ", ".join(["0"] * 16)
    text = BRANCHED.replace("4] w = {0}", f"4] w = {{{zeros}}}").replace(
        "4] v = {0}", f"4] v = {{{zeros}}}"
    )
    found = footprint(
        onnx.parser.parse_model(text.replace("b = {0}", "b = {0, 0, 0, 0}")), {"batch": 1}
    )
    assert found is not None
    assert found.weights == 16 * 2 + 16 * 4 + 4 * 4 + 16 * 4
    flag, x, y = 1, 16, 16
    assert found.activations == max(flag + x + y, flag + x + y + 16)


class Skipping(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 16))
        self.register_buffer("limits", torch.full((8,), 0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        limits = self.get_buffer("limits")
        y: torch.Tensor = torch.ops.thresher.sparse_linear(x, self.weight, limits, 6)
        return y


def test_engines_with_branches_are_estimated_and_planned_alike(tmp_path: Path) -> None:
    program = trace(
        Skipping().eval(),
        {"x": torch.zeros(2, 3, 8)},
        dynamic={"x": {0: "batch"}},
        info=SourceInfo("skipping", "random"),
    )
    stored = 4 * 8 * (16 + 1)
    kept = export(program, tmp_path / "e", threads=1, check=False).manifest.estimate
    foreseen = outlook(program, backend("cpu")).memory
    assert kept is not None
    assert foreseen is not None
    assert kept["weights"] == foreseen.weights == stored + 4 * 8 * 16
    assert kept["activations"] == foreseen.activations
    unbranched = outlook(program, backend("openvino")).memory
    assert unbranched is not None
    assert unbranched.weights == stored


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
