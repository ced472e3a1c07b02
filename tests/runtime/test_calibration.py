"""Ranges that are observed, the engines made with them, and data that does not serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.compiler.toys import TOKENS, WIDTH, Toy, traced
from tests.runtime.toys import transformer
from thresher.compiler.errors import RefusedError, UsageError, VerdictError
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program
from thresher.compiler.recipe import load_recipe
from thresher.runtime import Engine, ProgramRunner, export, verify
from thresher.runtime.backends import openvino
from thresher.runtime.backends.onnx_runtime import session_options
from thresher.runtime.calibration import BINS, CalibrationData, Magnitudes, calibrate
from thresher.runtime.deviation import Deviations, Tolerance, tolerance
from thresher.runtime.host import lacks_vnni
from thresher.runtime.manifest import MODEL, TensorInfo

SPECS = (TensorInfo(name="x", dtype="float32", shape=("batch", 8, 16)),)


class Data:
    """Arrays as a data set."""

    name = "numbers"

    def __init__(self, x: NDArray[Any], labels: NDArray[Any] | None = None) -> None:
        self.x, self.labels = x, labels

    def batches(self, size: int, limit: int | None = None) -> Iterator[Any]:
        for start in range(0, min(len(self.x), limit or len(self.x)), size):
            chosen = slice(start, min(start + size, limit or len(self.x)))
            labels = None if self.labels is None else self.labels[chosen]
            yield {"x": self.x[chosen]}, labels


def normal(count: int, *shape: int, seed: int = 0) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal((count, *shape))
    return drawn.astype(np.float32)


TOYS = Data(normal(32, TOKENS, WIDTH))


@pytest.fixture(scope="module")
def dense() -> Program:
    return traced(Toy())


@pytest.fixture(scope="module")
def reduced(dense: Program) -> Program:
    return optimize(dense, load_recipe("tome", ["r=2"]))


def squared_error(values: NDArray[Any], limit: float) -> float:
    """What rounding really costs, sample by sample."""
    step = limit / 127
    kept = np.clip(np.rint(values / step), -128, 127) * step
    return float(np.square(kept - values).mean())


@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy", "standard_exponential"])
def test_the_limit_costs_little_more_than_the_best_of_all(draw: str) -> None:
    values = getattr(np.random.default_rng(1), draw)(20_000)
    found = Magnitudes()
    found.add(values)
    peak = np.abs(values).max()
    best = min(squared_error(values, peak * share) for share in np.geomspace(1e-3, 1, 400))
    assert squared_error(values, found.limit()) <= 1.1 * best
    assert found.limit() <= peak
    if draw == "standard_normal":
        assert found.limit() < 0.99 * peak, "one in ten thousand does not set the scale"


@given(st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1), min_size=1))
def test_counting_in_parts_is_counting_at_once(parts: list[list[float]]) -> None:
    apart, backwards, whole = Magnitudes(), Magnitudes(), Magnitudes()
    for part in parts:
        apart.add(np.array(part, np.float32))
    for part in reversed(parts):
        backwards.add(np.array(part, np.float32))
    whole.add(np.concatenate([np.array(part, np.float32) for part in parts]))
    assert apart.counts.sum() == whole.counts.sum() == sum(map(len, parts))
    np.testing.assert_array_equal(apart.counts, whole.counts)
    np.testing.assert_array_equal(backwards.counts, whole.counts)
    assert apart.limit() == whole.limit() <= whole.peak


def test_zeros_have_no_range_and_equal_values_keep_theirs() -> None:
    zeros, equal = Magnitudes(), Magnitudes()
    zeros.add(np.zeros(9))
    assert zeros.limit() == 0
    equal.add(np.zeros(3))
    equal.add(np.full(100, -0.7))
    assert equal.limit() == pytest.approx(0.7, rel=4 / BINS)


def integer_products(engine: Engine, folder: Path) -> int:
    """How many products ONNX Runtime computes on integers; none may be left with a float weight."""
    import onnxruntime as ort

    options = session_options(1)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(str(engine.folder / MODEL), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimised.onnx").graph
    weights = {i.name for i in graph.initializer} | {
        n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"
    }
    float_products = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
    assert not [n for n in graph.node if n.op_type in float_products and n.input[1] in weights]
    return sum(n.op_type in ("MatMulIntegerToFloat", "QLinearMatMul") for n in graph.node)


@pytest.mark.parametrize("target", ["cpu", "openvino"])
@pytest.mark.parametrize("kind", ["reduced", pytest.param("dense", marks=pytest.mark.slow)])
def test_engines_really_compute_in_integers_and_agree(
    target: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
        if lacks_vnni():
            pytest.skip("without VNNI OpenVINO's int8 sums saturate")
    program = request.getfixturevalue(kind)
    with export(
        program, tmp_path / "e", target=target, precision="int8", data=TOYS, threads=1
    ) as engine:
        manifest = engine.manifest
        assert manifest.calibration == {
            "data": "numbers",
            "samples": 32,
            "method": "least expected squared error",
            "layers": 9,
        }
        assert manifest.estimate is not None
        assert manifest.verified is not None
        assert manifest.verified["inputs"] == "numbers"
        assert manifest.verified["outputs"]["output"]["samples"] == 32
        if target == "cpu":
            assert integer_products(engine, tmp_path) == 9
        else:
            model: Any = engine._session._request.get_compiled_model().get_runtime_model()  # type: ignore[union-attr]
            told = [op.get_rt_info() for op in model.get_ops()]
            kinds = [
                i["runtimePrecision"].astype(str)
                for i in told
                if i["layerType"].astype(str) == "FullyConnected"
            ]
            assert kinds == ["i8"] * 9
        assert {spec.dtype for spec in (*engine.inputs, *engine.outputs)} == {"float32"}
        for batch in (1, 5):
            outputs = engine.run({"x": normal(batch, TOKENS, WIDTH, seed=3)})
            assert outputs["output"].shape == (batch, 4)
        found = verify(ProgramRunner(program, threads=1), engine, dataset=TOYS)
    assert found.met
    assert "int8" in found.same_function.reason
    error = found.same_function.outputs[0]
    assert error.sqnr_db is not None
    assert 15 < error.sqnr_db < 60, "rounded, and not more than that"


@pytest.mark.parametrize("lacks", [True, False])
def test_sums_that_overflow_are_told_where_an_engine_is_opened(
    reduced: Program,
    lacks: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setattr(openvino, "lacks_vnni", lambda: lacks)
    openvino._warn_of_overflow.cache_clear()
    export(
        reduced, tmp_path / "e", target="openvino", precision="int8", data=TOYS, threads=1
    ).close()
    assert caplog.text.count("no VNNI") == lacks


def test_tensorrt_rtx_builds_a_graph_of_pairs(reduced: Program, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    shapes = [f"x=1..8x{TOKENS}x{WIDTH}@4"]
    engine = export(
        reduced,
        tmp_path / "e",
        target="tensorrt-rtx",
        precision="int8",
        data=TOYS,
        shapes=shapes,
        threads=1,
    )
    assert engine.manifest.built["layers"]["int8"] == 2 * 9  # a rounded input and a weight each
    assert engine.manifest.verified is not None
    assert engine.manifest.verified["run by"] == "CPUExecutionProvider"


def test_the_same_data_makes_the_same_file() -> None:
    made = []
    for x in (normal(20, 8, 16), normal(20, 8, 16), normal(20, 8, 16, seed=1)):
        model = ir.from_proto(transformer(keep=5))
        calibrated(x, model)
        made.append(ir.to_proto(model).SerializeToString())
    assert made[0] == made[1] != made[2]


def test_a_length_that_varies_stays_variable(tmp_path: Path) -> None:
    program = traced(Toy(pool="mean"), dynamic=True)
    with export(program, tmp_path / "e", precision="int8", data=TOYS, threads=1) as engine:
        for tokens in (3, 20):
            assert engine.run({"x": normal(2, tokens, WIDTH)})["output"].shape == (2, 4)


def test_data_is_needed_before_any_work(
    dense: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "thresher.compiler.lowering.to_onnx", lambda *a, **k: pytest.fail("lowered")
    )
    with pytest.raises(
        UsageError, match=r"'int8' is calibrated on data, .*--data DATA.*: give it some"
    ):
        export(dense, tmp_path / "e", precision="int8")
    with pytest.raises(UsageError, match="a largest drop needs labelled data"):
        export(dense, tmp_path / "e", max_drop=1.0)


def calibrated(x: NDArray[Any], model: ir.Model | None = None) -> dict[str, Any]:
    made = model or ir.from_proto(transformer())
    return calibrate(made, SPECS, {}, CalibrationData(Data(x)), threads=1)


def test_data_that_does_not_serve_is_told_in_one_sentence() -> None:
    with pytest.raises(UsageError, match="gives 15 samples to calibrate on and 16 are the least"):
        calibrated(normal(15, 8, 16))
    holed = normal(20, 8, 16)
    holed[9, 0, 0] = np.nan
    with pytest.raises(UsageError, match="not finite in the input 'x' of the samples 8 to 11"):
        calibrated(holed)
    with pytest.raises(UsageError, match="axis 2 of the input 'x' is 15 and must be 16"):
        calibrated(normal(20, 8, 15))


def test_a_tensor_that_overflows_is_named() -> None:
    proto = transformer()
    proto.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.full((16, 16), 3e38, np.float32), "weight")
    )
    with pytest.raises(RefusedError, match="'h1' is not finite on numbers"):
        calibrated(normal(20, 8, 16), ir.from_proto(proto))


def test_an_engine_that_answers_differently_is_not_written(
    dense: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ProgramRunner(dense, threads=1).run({"x": TOYS.x})["output"].argmax(1)
    right = Engine.run

    def often_wrong(self: Engine, inputs: Any) -> Any:
        return {
            n: np.where(np.arange(len(v))[:, None] % 4, v, -v)
            for n, v in right(self, inputs).items()
        }

    monkeypatch.setattr(Engine, "run", often_wrong)
    with pytest.raises(VerdictError, match="agrees with the program's in 24 of 32 samples and 90%"):
        export(dense, tmp_path / "e", precision="int8", data=TOYS, threads=1)
    monkeypatch.setattr(
        "thresher.runtime.verifying.tolerance", lambda _: Tolerance(3.0, "anything goes")
    )
    data = Data(TOYS.x, labels)
    with pytest.raises(VerdictError, match=r"a loss of \d\d\.\d\d points where 5 may be lost"):
        export(dense, tmp_path / "e", precision="int8", data=data, max_drop=5.0, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_eight_bits_are_judged_by_answers() -> None:
    reference = np.eye(10)
    other = reference + 0.3 * np.roll(reference, 1, axis=1)  # far off, with the same answers
    for change, same in ((0, True), (1, True), (2, False)):
        deviations = Deviations(tolerance("int8"))
        wrong = other.copy()
        wrong[:change] = np.roll(reference, 2, axis=1)[:change] * 0.9
        deviations.add({"y": reference}, {"y": wrong})
        (error,) = deviations.results()
        assert (error.agreeing, error.same) == (10 - change, same)
    deviations = Deviations(tolerance("int8"))
    deviations.add({"y": reference}, {"y": np.full((10, 10), np.nan)})
    assert not deviations.results()[0].same
