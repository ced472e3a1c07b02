"""Nothing is loaded before the manifest has been read and believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runtime import toys
from thresher.compiler.errors import MissingRequirementError, UsageError
from thresher.runtime.backends.cpu import OnnxRuntimeCpu
from thresher.runtime.engine import Engine
from thresher.runtime.manifest import MANIFEST, MODEL, Manifest, TensorInfo, digest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine whose back end must not be asked to load anything."""
    toys.engine(tmp_path / "toy.engine").close()

    def never(*arguments: object) -> None:
        pytest.fail("the engine was opened before the checks were done")

    monkeypatch.setattr(OnnxRuntimeCpu, "open", never)
    return tmp_path / "toy.engine"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_round_trip(folder: Path) -> None:
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    assert manifest.schema_version == 1
    assert manifest.target == "cpu"
    assert manifest.files == {MODEL: digest(folder / MODEL)}
    assert [spec.shape for spec in manifest.inputs] == [("batch", 8, 16)]
    assert manifest.requires == {"onnxruntime": ">=1.18"}
    assert {"onnxruntime", "numpy", "onnx"} <= manifest.versions.keys()
    assert manifest.created.endswith("+00:00")


def test_a_folder_that_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not an engine: manifest.json is missing; make one"):
        Engine.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_broken_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UsageError, match=r"manifest.json cannot be read .* rebuild with 'thresher"):
        Engine.load(folder)


def test_another_schema_names_both_versions_and_the_remedy(folder: Path) -> None:
    edit(folder, schema_version=7, new_field=1)
    with pytest.raises(UsageError) as caught:
        Engine.load(folder)
    assert "schema version 7 and this thresher reads 1" in str(caught.value)
    assert f"'thresher export SOURCE -o {folder} --target cpu --overwrite'" in str(caught.value)


def test_a_wrong_field_is_named(folder: Path) -> None:
    edit(folder, precision="fp12")
    with pytest.raises(UsageError, match=r"is wrong at 'precision'"):
        Engine.load(folder)
    edit(folder, precision="fp32", colour="red")
    with pytest.raises(UsageError, match=r"is wrong at 'colour'"):
        Engine.load(folder)


def test_an_unknown_target_gives_the_nearest(folder: Path) -> None:
    edit(folder, target="openvin")
    with pytest.raises(UsageError, match="no target 'openvin'; did you mean 'openvino'"):
        Engine.load(folder)


def test_a_changed_file_is_named(folder: Path) -> None:
    data = bytearray((folder / MODEL).read_bytes())
    data[-1] ^= 1
    (folder / MODEL).write_bytes(data)
    with pytest.raises(UsageError, match=r"model.onnx is not the file that was exported") as caught:
        Engine.load(folder)
    assert "'thresher export toy:model -o" in str(caught.value)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / MODEL).unlink()
    with pytest.raises(UsageError, match=r"model.onnx is missing: rebuild"):
        Engine.load(folder)


@pytest.mark.parametrize(
    ("requires", "words"),
    [
        ({"onnxruntime": ">=99.0"}, "needs onnxruntime >=99.0 and 1."),
        ({"onnxruntime": "==1.0"}, "needs onnxruntime ==1.0"),
        ({"no-such-package": ">=1"}, "needs no-such-package >=1 and none is installed"),
    ],
)
def test_versions_are_checked_first(folder: Path, requires: dict[str, str], words: str) -> None:
    edit(folder, requires=requires)
    with pytest.raises(MissingRequirementError, match=words):
        Engine.load(folder)


def test_the_rebuild_command_of_a_reduced_engine(tmp_path: Path) -> None:
    with toys.engine(tmp_path / "small", keep=4) as engine:
        command = engine.manifest.rebuild(engine.folder)
    assert "DIR (the folder that 'thresher optimize' wrote)" in command


def test_the_rebuild_command_asks_for_the_same_sizes() -> None:
    x = TensorInfo(name="x", dtype="float32", shape=("batch", 3, 24))
    made = Manifest(
        thresher="0", created="", target="tensorrt", precision="fp32", inputs=(x,), outputs=(),
        ranges={"batch": (1, 32)}, usual={"batch": 8},
    )  # fmt: skip
    assert "--shape x=1..32x3x24@8 --overwrite" in made.rebuild(Path("e"))
    assert "--shape" not in made.model_copy(update={"ranges": {}}).rebuild(Path("e"))
