"""The table of kinds, ``.pt2`` archives and ``module:function``."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.export import Dim, export

from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.lowering import to_onnx
from thresher.models.sources import kind_of, load_source
from thresher.models.spec import ModelSpec


class Mixer(nn.Module):
    """Attention over ``[B, N, 8]`` with a dict of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        return {"tokens": mixed, "mean": mixed.mean(1)}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    dims = {"x": {0: Dim("batch"), 1: Dim("tokens")}}
    exported = export(Mixer().eval(), (torch.randn(2, 5, 8),), dynamic_shapes=dims)
    torch.export.save(exported, tmp_path / "m.pt2")
    return tmp_path / "m.pt2"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module into the current folder; its name is new each time."""
    monkeypatch.chdir(tmp_path)
    names: list[str] = []

    def write(body: str) -> str:
        name = f"user_models_{tmp_path.name}_{len(names)}".replace("-", "_")
        head = "import torch\nfrom thresher.models.spec import ModelSpec\n"
        (tmp_path / f"{name}.py").write_text(head + body)
        names.append(name)
        importlib.invalidate_caches()
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], **extra: bytes) -> Path:
    """A copy of an archive with the content of its entries changed, and with further ones."""
    other = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as new:
        top = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in extra.items():
            new.writestr(f"{top}/{name}", content)
    return other


def unchanged(name: str, content: bytes) -> bytes:
    return content


def in_model(change: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    """A change of the JSON that describes the graph."""

    def apply(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        model = json.loads(content)
        change(model)
        return json.dumps(model).encode()

    return apply


def test_kinds(tmp_path: Path) -> None:
    forms = ["timm:a.b", "hf:some/dir", "a.onnx", "b/c.pt2", "pkg.mod:make", str(tmp_path)]
    kinds = [kind_of(form)[0].form for form in forms]
    assert kinds[:5] == ["timm:NAME", "hf:DIR", "FILE.onnx", "FILE.pt2", "module:function"]
    assert kinds[5].startswith("a folder")
    with pytest.raises(UsageError, match=r"'x\.txt' is not a model: give timm:NAME, hf:DIR"):
        load_source("x.txt")


def test_hugging_face_folder_without_its_prefix(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=f"write hf:{tmp_path}"):
        load_source(str(tmp_path))


def test_folder_of_another_program(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder written by"):
        load_source(str(tmp_path))


def test_onnx_is_read_by_the_importer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.onnx does not exist"):
        load_source(str(tmp_path / "none.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf")
    with pytest.raises(UsageError, match=r"bad\.onnx"):
        load_source(str(tmp_path / "bad.onnx"), resolution=32)


def test_onnx(archive: Path) -> None:
    path = archive.with_suffix(".onnx")
    ir.save(to_onnx(load_source(str(archive))), path)
    program = load_source(str(path))
    assert [(s.name, s.shape) for s in program.inputs] == [("x", ("batch", "x_1", 8))]
    with pytest.raises(UsageError, match="has no input that takes a resolution"):
        load_source(str(path), resolution=32)
    with pytest.raises(UsageError, match="has no input that takes a length"):
        load_source(str(path), length=8)


def test_archive(archive: Path) -> None:
    program = load_source(str(archive))
    assert [(s.name, s.shape) for s in program.inputs] == [("x", ("batch", "x_1", 8))]
    assert [s.name for s in program.outputs] == ["tokens", "mean"]
    assert program.info.digest is not None
    x = torch.randn(3, 7, 8)
    assert program.run({"x": x})["tokens"].shape == (3, 7, 8)
    again = archive.with_name("folder")
    program.save(again)
    torch.testing.assert_close(load_source(str(again)).run({"x": x}), program.run({"x": x}))
    with pytest.raises(UsageError, match="takes no option 'weights'"):
        load_source(str(again), weights="random")


@pytest.mark.parametrize("content", [b"", b"PK junk", None])
def test_damaged_archive(archive: Path, content: bytes | None) -> None:
    archive.write_bytes(archive.read_bytes()[:2000] if content is None else content)
    with pytest.raises(UsageError, match=r"not a whole \.pt2 archive"):
        load_source(str(archive))


def test_zip_of_something_else(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt2")
    with pytest.raises(UsageError, match=r"not an archive of torch\.export\.save"):
        load_source(str(tmp_path / "w.pt2"))


def test_training_mode_is_refused(tmp_path: Path) -> None:
    class Dropping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, 0.5, self.training)

    torch.export.save(export(Dropping().train(), (torch.ones(2),)), tmp_path / "m.pt2")
    with pytest.raises(RefusedError, match="training mode"):
        load_source(str(tmp_path / "m.pt2"))


class Bomb:
    """A pickle that leaves a mark when it is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_pickled_inputs_are_not_executed(archive: Path) -> None:
    mark = archive.with_name("mark")
    bomb = archive.with_name("bomb.pt")
    torch.save((Bomb(mark),), bomb)

    def change(name: str, content: bytes) -> bytes:
        return bomb.read_bytes() if "sample_inputs" in name else content

    with pytest.raises(UsageError, match="cannot be loaded"):
        load_source(str(rewritten(archive, change)))
    assert not mark.exists()


def test_pickled_weights_are_not_executed(archive: Path) -> None:
    mark = archive.with_name("mark")
    bomb = archive.with_name("bomb.pt")
    torch.save(Bomb(mark), bomb)

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return bomb.read_bytes() if "/weights/weight_" in name else content

    with pytest.raises(UsageError, match="cannot be loaded"):
        load_source(str(rewritten(archive, change)))
    assert not mark.exists()


def test_pickled_objects_and_compiled_code_are_refused(archive: Path) -> None:
    content = pickle.dumps(Bomb(archive.with_name("mark")))
    for name, message in (
        ("data/constants/opaque_obj_0", "a pickled object"),
        ("data/constants/custom_obj_0", "a pickled object"),
        ("data/aotinductor/model/x.so", "compiled code"),
    ):
        with pytest.raises(RefusedError, match=message):
            load_source(str(rewritten(archive, unchanged, **{name: content})))


def test_code_in_the_graph_is_refused(archive: Path) -> None:
    def operator(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"

    def library(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.load_library"

    def size(model: Any) -> None:
        text = json.dumps(model["graph_module"]["graph"]["sym_int_values"])
        assert "expr_str" in text
        start = text.index('"expr_str": "') + len('"expr_str": "')
        end = text.index('"', start)
        text = text[:start] + "__import__('os').system('true')" + text[end:]
        model["graph_module"]["graph"]["sym_int_values"] = json.loads(text)

    def name(model: Any) -> None:
        model["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = "x=print()"

    for change, message in (
        (operator, "the unknown operator 'torch.os.system'"),
        (library, "the unknown operator 'torch.ops.load_library'"),
        (size, "the size expression"),
        (name, r"the text 'x=print\(\)'"),
    ):
        with pytest.raises(RefusedError, match=message):
            load_source(str(rewritten(archive, in_model(change))))


GOOD = """
def make():
    model = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(model.weight)
    model.thresher_spec = ModelSpec({"input": torch.ones(2, 4)}, outputs=("scores",), labels="abc")
    return model

def bare():
    return torch.nn.Linear(4, 3)

def broken():
    raise ValueError("no such size")

def number():
    return 3

def empty():
    model = torch.nn.Linear(4, 3)
    model.thresher_spec = ModelSpec({})
    return model

setting = 5
"""


def test_function(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module(GOOD)
    program = load_source(f"{name}:make")
    assert [(s.name, s.shape) for s in program.inputs] == [("input", ("batch", 4))]
    assert [(s.name, s.shape) for s in program.outputs] == [("scores", ("batch", 3))]
    assert program.info.labels == ("a", "b", "c")
    assert str(tmp_path) not in sys.path
    torch.save({"weight": torch.ones(3, 4), "bias": torch.zeros(3)}, tmp_path / "w.pt")
    fitted = load_source(f"{name}:make", weights=str(tmp_path / "w.pt"))
    assert fitted.run({"input": torch.ones(1, 4)})["scores"].tolist() == [[4.0, 4.0, 4.0]]
    assert fitted.info.weights == "w.pt"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mak", "has no function 'mak'; did you mean 'make'"),
        ("bare", r"set module\.thresher_spec"),
        ("broken", r"broken\(\) raised ValueError: no such size"),
        ("number", "returned int, not a torch"),
        ("empty", "it is empty"),
        ("setting", "is of type int, not a function"),
    ],
)
def test_function_faults(module: Callable[[str], str], function: str, message: str) -> None:
    name = module(GOOD)
    with pytest.raises(UsageError, match=message):
        load_source(f"{name}:{function}")


def test_module_faults(module: Callable[[str], str]) -> None:
    with pytest.raises(UsageError, match="there is no module 'nowhere_at_all'"):
        load_source("nowhere_at_all:make")
    with pytest.raises(UsageError, match="needs 'package_that_is_missing': install it"):
        load_source(f"{module('import package_that_is_missing')}:make")
    with pytest.raises(UsageError, match=r"raised ZeroDivisionError: division by zero"):
        load_source(f"{module('1 / 0')}:make")
    with pytest.raises(UsageError, match="builds its own weights"):
        load_source(f"{module(GOOD)}:make", weights="random")


def test_untraceable_model_is_refused(module: Callable[[str], str]) -> None:
    body = """
class Branch(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x
def make():
    model = Branch()
    model.thresher_spec = ModelSpec({"x": torch.ones(2, 4)})
    return model
"""
    with pytest.raises(RefusedError, match=r"cannot be traced by torch\.export"):
        load_source(f"{module(body)}:make")


def test_masks_that_hide_nothing_are_left_out(module: Callable[[str], str]) -> None:
    body = """
class Masked(torch.nn.Module):
    def forward(self, x):
        q, mask = x[:, None], torch.arange(x.shape[1])[None, None, :, None] >= 0
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, mask.expand(-1, -1, 5, 5))

def make():
    model = Masked()
    model.thresher_spec = ModelSpec({"x": torch.randn(2, 5, 8)})
    return model
"""
    program = load_source(f"{module(body)}:make")
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "aten.scaled_dot_product_attention.default" in called
    assert not {"aten.arange.default", "aten.ge.Scalar"} & set(called)


def test_spec_takes_the_batch_as_dynamic_by_default() -> None:
    example = {"x": torch.ones(2, 3)}
    assert ModelSpec(example).axes() == {"x": {0: "batch"}}
    assert ModelSpec(example, dynamic={}).axes() == {}


def test_the_shipped_model() -> None:
    program = load_source("thresher.models.fashion:vit")
    assert [(s.name, s.shape) for s in program.inputs] == [("images", ("batch", 1, 28, 28))]
    assert [(s.name, s.shape) for s in program.outputs] == [("logits", ("batch", 10))]
    assert program.info.preprocessing is not None
    assert program.info.preprocessing["mean"] == [0.286]
    assert program.info.labels is not None
    assert program.info.labels[1] == "trouser"
