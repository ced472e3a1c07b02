"""ONNX files that are not imported: the kind of error, and that its sentence names the trouble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.models.onnx_text import feed, file_of, onnxruntime_outputs
from thresher.compiler.errors import RefusedError, UsageError
from thresher.models.onnx_import import import_onnx, importer


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A file that imports: attention over one weighted input."""
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32) + 0.1, "weight")
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["q"]),
        helper.make_node("Transpose", ["q"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "x"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, 1, ["b", "n", 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    opset = helper.make_opsetid("", 17)
    path = tmp_path / "whole.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def test_whole_file_is_imported(whole: Path) -> None:
    program = import_onnx(whole)
    inputs = feed(program.inputs, 2, 5)
    (wanted,) = onnxruntime_outputs(whole, inputs)
    np.testing.assert_allclose(program.run(inputs)["y"].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_broken_files_are_usage_errors(whole: Path, tmp_path: Path) -> None:
    path = whole
    broken = tmp_path / "broken.onnx"
    for content in (b"", b"not a model", path.read_bytes()[: path.stat().st_size // 2]):
        broken.write_bytes(content)
        with pytest.raises(UsageError, match="not a whole, valid ONNX file"):
            import_onnx(broken)
    with pytest.raises(UsageError, match="does not exist"):
        import_onnx(tmp_path / "nowhere.onnx")
    with pytest.raises(UsageError, match="cannot be read"):
        import_onnx(tmp_path)


def test_model_without_attention_is_refused(tmp_path: Path) -> None:
    path = file_of("<ir_version: 8, opset_import: ['' : 17]> g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }",
                   tmp_path)  # fmt: skip
    with pytest.raises(RefusedError, match="not a transformer: no attention was found"):
        import_onnx(path)


def test_unsupported_operators_are_named_at_once(tmp_path: Path) -> None:
    path = file_of(
        "<ir_version: 8, opset_import: ['' : 17, 'other' : 1]> g (float[n,4] x) => (float[n,4] y) {"
        " a = Det(x) b = other.Strange(x) c = other.Strange(b) y = Add(a, c) }",
        tmp_path,
    )
    with pytest.raises(RefusedError, match=r"Det \(1\), other::Strange \(2\)"):
        import_onnx(path)


def test_reduced_model_is_refused(tmp_path: Path) -> None:
    path = file_of(
        "<ir_version: 8, opset_import: ['' : 17, 'thresher' : 1]> g (float[n,4] x) => (float[n,4] y)"
        " { y = thresher.keep_tokens(x) }",
        tmp_path,
    )
    with pytest.raises(RefusedError, match="already reduced"):
        import_onnx(path)


def test_sizes_that_cannot_be_traced_are_named(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RefusedError("cannot be traced") from ValueError(
            "bounds violated! For more information, ..."
        )

    monkeypatch.setattr(importer, "trace", refuse)
    with pytest.raises(
        RefusedError, match=r"with b, n dynamic \(bounds violated!\): give these axes fixed"
    ):
        import_onnx(whole)
    with pytest.raises(RefusedError, match=r"^cannot be traced$"):
        import_onnx(whole, shapes={"x": (2, 5, 8)})


def test_old_opset_is_refused(tmp_path: Path) -> None:
    path = file_of("<ir_version: 4, opset_import: ['' : 8]> g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }",
                   tmp_path)  # fmt: skip
    with pytest.raises(RefusedError, match="opset 8 and the oldest supported is 9"):
        import_onnx(path)


def test_external_data_stays_in_the_folder(whole: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    model, path = onnx.load(whole), inner / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert import_onnx(inner / "m.onnx").inputs == import_onnx(whole).inputs

    outside = onnx.load(inner / "m.onnx", load_external_data=False)
    for entry in outside.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../m.data"
    (inner / "m.data").rename(tmp_path / "m.data")
    (inner / "outside.onnx").write_bytes(outside.SerializeToString())
    with pytest.raises(UsageError, match="outside its own folder"):
        import_onnx(inner / "outside.onnx")
    (inner / "m.data").symlink_to(tmp_path / "m.data")
    with pytest.raises(UsageError, match="outside its own folder"):
        import_onnx(inner / "m.onnx")
    (inner / "m.data").unlink()
    with pytest.raises(UsageError, match=r"needs the file 'm\.data' beside it"):
        import_onnx(inner / "m.onnx")


def test_sparse_weights_are_refused(whole: Path, tmp_path: Path) -> None:
    model = onnx.load(whole)
    model.graph.sparse_initializer.add().dims.append(1)
    (tmp_path / "sparse.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(RefusedError, match="sparse weights"):
        import_onnx(tmp_path / "sparse.onnx")


def test_axis_that_cannot_be_dynamic_is_named(tmp_path: Path) -> None:
    path = file_of(
        "<ir_version: 8, opset_import: ['' : 17]> g (float[b,n,8] q, float[b,5,8] k, float[b,5,8] v)"
        " => (float[b,n,8] y) {"
        " kt = Transpose<perm = [0,2,1]>(k) s = MatMul(q, kt) p = Softmax<axis = -1>(s)"
        " z = MatMul(p, v) y = Add(z, v) }",
        tmp_path,
    )
    with pytest.raises(RefusedError, match=r"axis 1 \('n'\) of input 'q'"):
        import_onnx(path)
