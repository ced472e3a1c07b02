"""Back ends say what they take and what they lack before anything is built."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from tests.runtime import toys
from thresher.compiler.errors import MissingRequirementError, RefusedError, UsageError
from thresher.runtime.backends import TARGETS, backend
from thresher.runtime.backends.onnx_runtime import open_session, session_options
from thresher.runtime.backends.openvino import _hint
from thresher.runtime.bundle import demand_target, package
from thresher.runtime.deviation import tolerance


def model(body: str, opset: int = 20, functions: str = "") -> onnx.ModelProto:
    imports = f'["":{opset}, "thresher":1, "com.microsoft":1]'
    head = f"<ir_version: 10, opset_import: {imports}> g (float[2, 3] x) => (float[2, 3] y)"
    return onnx.parser.parse_model(f"{head} {{ {body} }} {functions}")


@pytest.mark.parametrize("target", TARGETS)
def test_what_every_back_end_takes(target: str) -> None:
    maker = backend(target)
    assert maker.target == target
    assert maker.problems(toys.transformer(5)) == []
    gpu = target.startswith(("tensorrt", "jetson"))
    assert len(maker.problems(model("y = com.microsoft.Gelu(x)"))) == gpu


@pytest.mark.parametrize("target", TARGETS)
def test_an_unknown_operator_is_a_problem(target: str) -> None:
    found = backend(target).problems(model("[odd] y = thresher.Nope(x)"))
    assert [(p.node, p.op) for p in found] == [("odd", "thresher::Nope")]
    assert "no function body" in found[0].reason


def test_problems_inside_functions_and_branches_are_found() -> None:
    head = '<domain: "thresher", opset_import: ["":20, "thresher":1]>'
    body = f"{head} F (x) => (y) {{ [in] y = thresher.Nope(x) }}"
    outer = model("y = thresher.F(x)", functions=body)
    assert [p.node for p in backend("cpu").problems(outer)] == ["in"]
    branch = "g () => (float[2, 3] z) { [deep] z = thresher.Nope(x) }"
    branches = f"<then_branch = {branch}, else_branch = {branch}>"
    text = f"c = Constant<value=bool {{1}}>() y = If(c) {branches}"
    assert [p.node for p in backend("cpu").problems(model(text))] == ["deep", "deep"]


def test_every_problem_is_told_at_once() -> None:
    chain = ("[a] t", "x"), ("[b] u", "t"), ("[c] v", "u"), ("[d] y", "v")
    bad = model(" ".join(f"{made} = thresher.No({taken})" for made, taken in chain))
    with pytest.raises(
        RefusedError, match=r"a \(thresher::No\).*; b .*; c .* and 1 more"
    ) as caught:
        backend("cpu").refuse_problems(bad)
    assert "choose another target" in str(caught.value)


def test_kernels_are_looked_up_by_version() -> None:
    maker = backend("cpu")
    node = onnx.helper.make_node("Gelu", ["x"], ["y"])
    assert maker.can_take(node, 20) is None
    assert maker.can_take(onnx.helper.make_node("Constant", [], ["y"]), 20) is None
    assert maker.can_take(onnx.helper.make_node("Gelu", ["x"], ["y"]), 13) is not None


def test_the_oldest_runtime_follows_from_the_file() -> None:
    newer = model("y = Relu(x)", opset=23)
    assert backend("cpu").requires(newer) == {"onnxruntime": ">=1.23"}


def test_an_unknown_target() -> None:
    known = "cpu, cuda, jetson-orin, jetson-thor, openvino, tensorrt"
    with pytest.raises(UsageError, match=f"there is no target 'jax'; known: {known}"):
        backend("jax")


def test_a_missing_package_says_why_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def blocked(name: str, *rest: Any, **more: Any) -> Any:
        if name == "openvino":
            raise ImportError("libtbb.so.12: cannot open shared object file")
        return real(name, *rest, **more)

    monkeypatch.setattr("importlib.import_module", lambda name: blocked(name))
    maker = __import__("thresher.runtime.backends.openvino", fromlist=["x"]).OpenVino()
    state = maker.available()
    assert not state.ok
    assert "libtbb.so.12" in state.reason
    with pytest.raises(
        MissingRequirementError, match=r"libtbb.*pip install 'thresher\[openvino\]'"
    ):
        maker.demand()


def test_a_missing_provider_is_no_silent_fall_back(tmp_path: Path) -> None:
    onnx.save(toys.transformer(), tmp_path / "m.onnx")
    with pytest.raises(MissingRequirementError, match="CUDAExecutionProvider is not in this onnx"):
        open_session(tmp_path / "m.onnx", session_options(1), "CUDAExecutionProvider")


def test_a_provider_that_does_not_load_is_no_silent_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu lists CUDA, fails to load it, logs that, and runs on the CPU."""
    onnx.save(toys.transformer(), tmp_path / "m.onnx")
    monkeypatch.setattr(
        "onnxruntime.get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    with (
        pytest.warns(UserWarning, match="CUDA"),
        pytest.raises(MissingRequirementError, match="fell back"),
    ):
        open_session(tmp_path / "m.onnx", session_options(1), "CUDAExecutionProvider")


def test_a_model_that_the_runtime_refuses(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("not a model")
    with pytest.raises(RefusedError, match=r"refuses .*m.onnx: .*Protobuf"):
        open_session(tmp_path / "m.onnx", session_options(1))


def test_products_of_eight_bits_do_not_saturate(tmp_path: Path) -> None:
    """Without VNNI two products of the largest numbers are more than the processor's sum of them holds."""
    text = """<ir_version: 10, opset_import: ["":20]> g (float[1, 32, 64] x) => (float[1, 32, 64] y)
        <float step = {1.0}, int8 zero = {0}> {
          q = QuantizeLinear(x, step, zero)
          rounded = DequantizeLinear(q, step, zero)
          weights = DequantizeLinear<axis = 1>(w, steps, zeros)
          y = MatMul(rounded, weights)
        }"""
    made = onnx.parser.parse_model(text)
    held: dict[str, np.ndarray] = {
        "steps": np.ones(64, np.float32),
        "zeros": np.zeros(64, np.int8),
        "w": np.full((64, 64), 127, np.int8),
    }
    made.graph.initializer.extend(onnx.numpy_helper.from_array(v, name) for name, v in held.items())
    onnx.save(made, tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx", session_options(1))
    (y,) = session.run(None, {"x": np.full((1, 32, 64), 127, np.float32)})
    np.testing.assert_array_equal(y, 64 * 127 * 127)


def test_openvino_agrees_with_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    feeds = toys.feeds(3)
    with toys.engine(tmp_path / "a", keep=5) as cpu:
        expected = cpu.run(feeds)["logits"]
    with toys.engine(tmp_path / "b", keep=5, target="openvino") as engine:
        assert engine.details["arithmetic"] == "f32"
        assert set(engine.manifest.files) == {"model.onnx", "openvino.xml", "openvino.bin"}
        assert onnx.load(engine.folder / "model.onnx").functions, "model.onnx keeps its functions"
        found = engine.run(feeds)["logits"]
        again = engine.run(toys.feeds(1))
        assert again["logits"].shape == (1, 10)
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()


def test_openvino_says_what_it_cannot_convert(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    odd = model("y = com.microsoft.Nope(x)")
    with pytest.raises(RefusedError, match="Nope"):
        package(odd, tmp_path / "e", target="openvino")
    assert list(tmp_path.iterdir()) == []


class Core:
    """An OpenVINO core on a CPU that can do what it is told."""

    def __init__(self, *able: str) -> None:
        self.able = able

    def get_property(self, device: str, name: str) -> tuple[str, ...]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return self.able


def test_bfloat16_is_what_was_asked_for_or_a_requirement() -> None:
    assert _hint(Core("FP32", "BF16"), "bf16") == "bf16"
    assert _hint(Core("FP32", "BF16"), "fp32") == "f32"
    with pytest.raises(MissingRequirementError, match=r"no bfloat16 .*has FP32, FP16.*fp32$"):
        _hint(Core("FP32", "FP16"), "bf16")
    with pytest.raises(UsageError, match="target 'cpu' has no precision 'bf16'"):
        demand_target("cpu", "bf16")


def test_a_bfloat16_engine_keeps_its_weights_and_computes_coarsely(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16 arithmetic")
    feeds = toys.feeds(3)
    with toys.engine(tmp_path / "a") as exact:
        expected = exact.run(feeds)["logits"]
    with toys.engine(tmp_path / "b", target="openvino", precision="bf16") as engine:
        found = engine.run(feeds)["logits"]
        assert engine.details["arithmetic"] == "bf16"
    error = abs(found - expected).max() / abs(expected).max()
    assert 1e-5 < error < tolerance("bf16").relative
