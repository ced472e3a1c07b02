"""The folder for a Jetson, and its scripts on stand-ins for what JetPack brings.  No Jetson was used."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.runtime import toys
from tests.runtime.fake_jetson import Device
from thresher.compiler.errors import MissingRequirementError
from thresher.runtime import Engine
from thresher.runtime.backends import jetson
from thresher.runtime.bundle import Facts, package
from thresher.runtime.exporting import agree

SCRIPTS = ("build.py", "run.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle for batches of 1 to 4."""
    facts = Facts(ranges={"batch": (1, 4)}, usual={"batch": 2}, sites=1)
    package(toys.transformer(5), tmp_path / "j", target="jetson-orin", facts=facts, threads=1)
    return tmp_path / "j"


@pytest.fixture
def device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(folder, monkeypatch)


def test_the_engine_that_is_built_there_computes_what_the_model_does(
    device: Device, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device.main("build.py", "--workspace", 64) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["tensorrt"], record["capability"], record["plugins"]) == ("10.3.0", "8.7", {})
    assert json.loads((folder / "engine.json").read_text()) == record
    assert json.loads((folder / "engine.plan").read_text())["sizes"] == {
        "x": [[1, 8, 16], [4, 8, 16]]
    }
    np.save(tmp_path / "x.npy", toys.feeds(3)["x"].astype(np.float64))
    files = ("--input", f"x={tmp_path / 'x.npy'}", "--save", tmp_path / "out.npz")
    assert device.main("run.py", *files, "--rounds", 5, "--warmup", 1) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["outputs"]["logits"]["shape"] == [3, 10]
    assert told["milliseconds"]["rounds"] == 5
    with toys.engine(tmp_path / "cpu", 5) as engine:
        expected = engine.run(toys.feeds(3))["logits"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], expected, rtol=1e-5)
    assert (device.cuda.memory, device.cuda.streams) == ({}, set()), "all that was taken was freed"


def test_timings_are_kept_unless_another_machine_made_them(device: Device, folder: Path) -> None:
    assert [device.main("build.py"), device.main("build.py")] == [0, 0]
    assert (folder / "timing.cache").read_bytes() == b"tt"
    (folder / "timing.cache").write_bytes(b"another machine's")
    assert device.main("build.py") == 0
    assert (folder / "timing.cache").read_bytes() == b"t"


def spoil(name: str) -> Callable[[Device], None]:
    return lambda device: (device.folder / name).write_bytes(b"bad")  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("script", "arguments", "spoilt", "said"),
    [
        ("build.py", [], spoil("model.onnx"), "model.onnx is not the file that was exported"),
        ("build.py", [], lambda d: (d.folder / "run.py").unlink(), "run.py is missing"),
        ("build.py", [], lambda d: d.install("8.6.2"), "TensorRT 10 is needed and 8.6.2 installed"),
        ("build.py", ["--plugins"], None, "NvInfer.h was not found"),
        ("run.py", ["--input", "x=X"], spoil("engine.plan"), "engine.plan is not what was built"),
        (
            "run.py",
            ["--input", "x=X"],
            lambda d: d.install("10.7.0"),
            "10.3.0 and 10.7.0 is installed",
        ),
        ("run.py", ["--input", "y=X"], None, "the engine takes x and y was given"),
        ("run.py", ["--input", "x=LARGE"], None, "not built for x of shape [5, 8, 16]"),
        ("run.py", ["--input", "x=WHOLE"], None, "x is int64 and the engine takes float32"),
        ("run.py", ["--input", "nothing"], None, "write NAME=FILE.npy or FILE.npz"),
    ],
)
def test_trouble_is_one_sentence(
    device: Device,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    script: str,
    arguments: list[str],
    spoilt: Callable[[Device], None] | None,
    said: str,
) -> None:
    arrays = {"X": np.ones((2, 8, 16), np.float32), "LARGE": np.ones((5, 8, 16), np.float32)}
    arrays["WHOLE"] = np.ones((2, 8, 16), np.int64)
    for name, value in arrays.items():
        np.save(tmp_path / f"{name}.npy", value)
        arguments = [a.replace(f"={name}", f"={tmp_path / name}.npy") for a in arguments]
    if script == "run.py":
        assert device.main("build.py") == 0
    if spoilt is not None:
        spoilt(device)
    capsys.readouterr()
    assert device.main(script, *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert said in err
    assert device.cuda.memory == {}


def test_the_gpu_has_to_be_the_one_that_the_folder_is_for(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = device.script("build.py")
    build.capability = lambda: "11.0"
    with pytest.raises(
        build.Trouble, match=r"capability 11.0 and the folder is for jetson-orin \(8.7\)"
    ):
        build.build(device.folder, False, False, None)
    assert build.build(device.folder, False, True, None)["capability"] == "11.0"

    def attribute(found: Any, number: int, place: Any) -> int:
        found._obj.value = {75: 8, 76: 7}[number]
        return 0

    driver = SimpleNamespace(
        cuInit=lambda flags: 0, cuDeviceGet=lambda found, index: 0, cuDeviceGetAttribute=attribute
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    asked = importlib.util.spec_from_file_location("again", device.folder / "build.py")
    assert asked is not None
    assert asked.loader is not None
    fresh: Any = importlib.util.module_from_spec(asked)
    asked.loader.exec_module(fresh)
    assert fresh.capability() == "8.7"


def test_plugins_travel_as_sources_and_are_compiled_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"kernels/tensorrt/CMakeLists.txt": "project(p)", "kernels/op/cuda.cu": "// kernel"}
    for name, content in sources.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(content)
    monkeypatch.setattr(jetson, "ROOT", tmp_path / "src")
    facts = Facts(ranges={"batch": (1, 4)})
    made = package(
        toys.transformer(5), tmp_path / "j", target="jetson-thor", facts=facts, threads=1
    )
    assert set(sources) <= set(made.manifest.files)
    device = Device(tmp_path / "j", monkeypatch)
    build = device.script("build.py")
    build.capability = lambda: "11.0"
    seen: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        seen.append(command)
        if "--build" in command:
            (tmp_path / "j/build").mkdir()
            (tmp_path / "j/build/libsteps.so").write_bytes(b"code")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(build.subprocess, "run", run)
    record = build.build(tmp_path / "j", True, False, None)
    assert set(record["plugins"]) == {"build/libsteps.so"}
    assert "-DCMAKE_CUDA_ARCHITECTURES=110" in seen[0]
    assert device.trt.libraries == [str(tmp_path / "j/build/libsteps.so")]


def test_the_folder_is_whole_and_its_model_compared_elsewhere(tmp_path: Path) -> None:
    with toys.engine(tmp_path / "cpu", 5) as reference:
        engine = package(
            toys.transformer(5),
            tmp_path / "j",
            target="jetson-orin",
            facts=Facts(ranges={"batch": (1, 4)}),
            threads=1,
            check=lambda made: agree(reference, made),
        )
    assert engine.manifest.verified is not None
    assert engine.manifest.verified["run by"] == "CPUExecutionProvider"
    assert engine.manifest.cache == ""
    lock = json.loads((tmp_path / "j/lock.json").read_text())
    listed = {"lock.json": engine.manifest.files["lock.json"], **lock["files"]}
    assert listed == engine.manifest.files
    with pytest.raises(
        MissingRequirementError, match=r"cannot be run: .*built on the device, by build"
    ):
        Engine.load(tmp_path / "j").run(toys.feeds())


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_those_of_the_package_and_need_python_3_10_alone(
    folder: Path, name: str
) -> None:
    source = next(script for script in jetson.SCRIPTS if script.name == name)
    assert (folder / name).read_bytes() == source.read_bytes()
    tree = ast.parse(source.read_text(), feature_version=(3, 10))
    taken = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    taken |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    outside = {str(name).partition(".")[0] for name in taken} - sys.stdlib_module_names
    assert outside == ({"tensorrt"} if name == "build.py" else {"tensorrt", "cuda", "numpy"})
    done = subprocess.run(
        [sys.executable, "-I", folder / name, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: {name}")


def test_the_builders_calls_are_those_of_tensorrts_interface(device: Device) -> None:
    """TensorRT-RTX has that interface and builds without a GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    profile = json.loads((device.folder / "lock.json").read_text())["profile"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it keeps no timings
        plan = device.script("build.py").serialized(trt, device.folder, profile, 64)
    assert len(memoryview(plan)) > 1000
    used = {
        trt.ICudaEngine: "get_tensor_name num_io_tensors get_tensor_mode create_execution_context",
        trt.IExecutionContext: "set_input_shape get_tensor_shape set_tensor_address execute_async_v3",
        trt.Runtime: "deserialize_cuda_engine",
        trt.IPluginRegistry: "load_library",
    }
    assert [n for kind, names in used.items() for n in names.split() if not hasattr(kind, n)] == []
