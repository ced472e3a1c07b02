"""Model folders for Triton: read by protobuf's own parser, and held against what the server checks."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format

from tests.runtime import toys
from tests.runtime.triton_schema import model_config, parameters
from thresher.compiler.errors import MissingRequirementError, RefusedError, UsageError
from thresher.runtime import Engine, bundle
from thresher.runtime.bundle import Facts, package
from thresher.runtime.manifest import Manifest, TensorInfo
from thresher.runtime.pbtxt import text
from thresher.runtime.serving import Wishes, configuration, copy_engine, demand, served, start

CONFIG = model_config()
X = TensorInfo(name="x", dtype="float32", shape=("batch", 3, "width"))
Y = TensorInfo(name="y", dtype="float16", shape=("batch", 4))


def manifest(**changes: Any) -> Manifest:
    plain: dict[str, Any] = {
        "thresher": "0",
        "created": "",
        "target": "cpu",
        "precision": "fp32",
        "inputs": (X,),
        "outputs": (Y,),
        "files": {"model.onnx": "", "openvino.bin": "", "openvino.xml": "", "tensorrt.engine": ""},
    }
    return Manifest(**{**plain, **changes})


def config(made: Manifest, wishes: Wishes | None = None) -> Any:
    return text_format.Parse(text(configuration(made, wishes or Wishes())), CONFIG())


def serve(engine: Path, folder: Path, wishes: Wishes | None = None, **options: Any) -> Any:
    target = json.loads((engine / "manifest.json").read_text())["target"]
    with served(folder, "triton", target, wishes or Wishes(), **options) as version:
        copy_engine(engine, version)
    return text_format.Parse((folder / "config.pbtxt").read_text(), CONFIG())


def test_the_version_is_the_engine_and_the_rest_describes_it(tmp_path: Path) -> None:
    toys.engine(tmp_path / "e", keep=5).close()
    (tmp_path / "e" / "notes.txt").write_text("not the engine's")
    read = serve(tmp_path / "e", tmp_path / "models/toy")
    made = {str(f.relative_to(tmp_path / "models")) for f in (tmp_path / "models").rglob("*")}
    files = {"config.pbtxt", "serving.json", "1", "1/model.onnx", "1/manifest.json"}
    assert made == {"toy", *(f"toy/{name}" for name in files)}
    with Engine.load(tmp_path / "models/toy/1") as engine:
        assert engine.run(toys.feeds())["logits"].shape == (2, 10)
    # What the ONNX Runtime back end demands: a symbolic batch, and outputs of exactly these sizes.
    session = ort.InferenceSession(tmp_path / "models/toy/1" / read.default_model_filename)
    for told, found in zip(
        [*read.input, *read.output], [*session.get_inputs(), *session.get_outputs()], strict=True
    ):
        sizes = [size if isinstance(size, int) else -1 for size in found.shape]
        assert (told.name, [-1, *told.dims]) == (found.name, sizes)


def test_batches_are_as_large_as_the_engine_allows() -> None:
    free = config(manifest())
    assert (free.max_batch_size, list(free.input[0].dims), list(free.output[0].dims)) == (
        32,
        [3, -1],
        [4],
    )
    assert free.HasField("dynamic_batching")
    assert "names none" in start(manifest(), Path("m"))["notes"][0]
    bound = config(manifest(ranges={"batch": (1, 16)}, usual={"batch": 8}, target="tensorrt:sm86"))
    assert (bound.backend, bound.default_model_filename) == ("tensorrt", "tensorrt.engine")
    assert (bound.max_batch_size, list(bound.dynamic_batching.preferred_batch_size)) == (16, [8])
    assert "kind: KIND_GPU" in str(bound)
    single = config(manifest(ranges={"batch": (1, 1)}))
    assert (single.max_batch_size, single.HasField("dynamic_batching")) == (1, False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ranges": {"batch": (2, 8)}}, "each has to bring 2 or more"),
        ({"outputs": (Y.model_copy(update={"shape": (7, 4)}),)}, "y does not begin with the batch"),
        ({"inputs": (X.model_copy(update={"shape": (2, 3)}),)}, "x does not begin with the batch"),
        (
            {"inputs": (X.model_copy(update={"shape": ("?", 3)}),)},
            "x does not begin with the batch",
        ),
        ({"target": "openvino"}, "fills every batch up"),
    ],
)
def test_requests_stay_as_they_come_where_they_cannot_be_put_together(
    changes: dict[str, Any], reason: str
) -> None:
    made = manifest(**changes)
    read = config(made)
    assert (read.max_batch_size, read.HasField("dynamic_batching")) == (0, False)
    for told, spec in zip([*read.input, *read.output], [*made.inputs, *made.outputs], strict=True):
        assert list(told.dims) == [n if isinstance(n, int) else -1 for n in spec.shape]
    assert reason in start(made, Path("m"))["notes"][0]


def test_what_a_server_cannot_be_told_is_said() -> None:
    def notes(**changes: str) -> str:
        return " ".join(start(manifest(**changes), Path("m"))["notes"])

    assert "VNNI" in notes(precision="int8")
    assert "VNNI" not in notes(precision="fp32")
    assert "VNNI" not in notes(target="openvino", precision="int8")
    assert "cannot ask OpenVINO for float32" in notes(target="openvino", precision="fp32")


def test_a_number_for_each_sample_is_sent_as_one_value() -> None:
    score = TensorInfo(name="score", dtype="bool", shape=("batch",))
    read = config(manifest(outputs=(Y, score)))
    assert [list(o.dims) for o in read.output] == [[4], [1]]
    assert [o.HasField("reshape") for o in read.output] == [False, True]


def test_openvino_computes_a_fixed_batch_as_the_server_would_ask_it(tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino")
    with toys.engine(tmp_path / "c", keep=5) as exact:
        expected = exact.run(toys.feeds(4))["logits"]
    facts = Facts(ranges={"batch": (4, 4)})
    package(toys.transformer(5), tmp_path / "e", target="openvino", facts=facts, threads=1).close()
    read = serve(tmp_path / "e", tmp_path / "m/toy", Wishes(threads=2))
    assert parameters(read) == {"INFERENCE_NUM_THREADS": "2", "ENABLE_BATCH_PADDING": "YES"}
    core = ov.Core()
    model = core.read_model(tmp_path / "m/toy/1" / read.default_model_filename)
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input("x").tensor().set_layout(ov.Layout("N..."))
    model = steps.build()
    ov.set_batch(model, read.max_batch_size)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(toys.feeds(4))["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_weights_beside_the_model_keep_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "EXTERNAL_ABOVE", 100)
    package(toys.transformer(), tmp_path / "e", threads=1).close()
    serve(tmp_path / "e", tmp_path / "m/toy")
    session = ort.InferenceSession(tmp_path / "m/toy/1/model.onnx")
    assert session.run(None, toys.feeds())[0].shape == (2, 10)


def test_classes_are_named_for_the_output_that_scores_them() -> None:
    other = TensorInfo(name="tokens", dtype="float32", shape=("batch", 9, 4))
    read = config(manifest(outputs=(other, Y), labels=("a", "b", "c", "d")))
    assert [o.label_filename for o in read.output] == ["", "labels.txt"]
    unclear = config(manifest(outputs=(Y, Y.model_copy(update={"name": "z"})), labels=("a",) * 4))
    assert [o.label_filename for o in unclear.output] == ["", ""]


def test_a_label_is_one_line_whatever_is_in_it(tmp_path: Path) -> None:
    labels = ("great\nwhite", "tench", *(f"c{i}" for i in range(8)))
    package(toys.transformer(), tmp_path / "e", facts=Facts(labels=labels), threads=1).close()
    serve(tmp_path / "e", tmp_path / "m/toy")
    assert (tmp_path / "m/toy/labels.txt").read_text().splitlines()[:2] == ["great white", "tench"]


def test_an_engine_that_needs_plugins_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"does not find the plugins .*: export for 'tensorrt'"):
        demand("triton", "tensorrt:PLUGINS")


def test_native_kernels_travel_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys.engine(tmp_path / "e").close()
    wishes = Wishes(kernels="/models/toy/libthresher_cpu.so")
    with pytest.raises(
        MissingRequirementError, match=r"no native kernels .*thresher kernels build"
    ):
        serve(tmp_path / "e", tmp_path / "m/toy", wishes)
    assert not (tmp_path / "m").exists()
    (tmp_path / "libthresher_cpu.so").write_bytes(b"a library")
    monkeypatch.setattr(
        "thresher.runtime.backends.cpu.kernel_library", lambda: tmp_path / "libthresher_cpu.so"
    )
    read = serve(tmp_path / "e", tmp_path / "m/toy", wishes)
    assert list(read.model_operations.op_library_filename) == [wishes.kernels]
    assert (tmp_path / "m/toy/libthresher_cpu.so").read_bytes() == b"a library"
    with (
        pytest.raises(UsageError, match="kernels are for target 'cpu', not for 'openvino'"),
        served(tmp_path / "m/b", "triton", "openvino", wishes),
    ):
        raise AssertionError("not reached")


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(RefusedError, match="no back end for engines of target 'tensorrt-rtx:sm86'"):
        demand("triton", "tensorrt-rtx:sm86")
    with pytest.raises(UsageError, match="no server 'trito'; did you mean 'triton'"):
        demand("trito", "cpu")
    odd = TensorInfo(name="x", dtype="complex64", shape=("batch", 2))
    with pytest.raises(RefusedError, match="no type for 'x', which is complex64"):
        config(manifest(inputs=(odd,)))
    with pytest.raises(RefusedError, match=r"cannot be served: it has model\.onnx$"):
        config(manifest(target="tensorrt", files={"model.onnx": ""}))


def test_an_engine_cannot_write_elsewhere(tmp_path: Path) -> None:
    manifest = toys.engine(tmp_path / "e").manifest
    (tmp_path / "secret").write_bytes(b"")
    stranger = {**manifest.files, "../secret": hashlib.sha256(b"").hexdigest()}
    manifest.model_copy(update={"files": stranger}).write(tmp_path / "e")
    with pytest.raises(UsageError, match=r"lists \.\./secret, which is not in it"):
        serve(tmp_path / "e", tmp_path / "m/toy")
    assert os.listdir(tmp_path / "m") == []


def test_an_older_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    toys.engine(tmp_path / "e").close()
    serve(tmp_path / "e", tmp_path / "m/toy")
    with pytest.raises(UsageError, match="exists already"):
        serve(tmp_path / "e", tmp_path / "m/toy")
    (tmp_path / "e/model.onnx").write_bytes(b"changed")
    before = (tmp_path / "m/toy/config.pbtxt").stat().st_ino
    with pytest.raises(UsageError, match="is not the file that was exported"):
        serve(tmp_path / "e", tmp_path / "m/toy", overwrite=True)
    assert (tmp_path / "m/toy/config.pbtxt").stat().st_ino == before
    assert os.listdir(tmp_path / "m") == ["toy"]
