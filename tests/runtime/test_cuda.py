"""Target cuda: never a silent fall back to the CPU.  No test needs a GPU or onnxruntime-gpu: what those
answer is put in place of onnxruntime's own functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.cli.conftest import cli, failed  # noqa: F401  (fixtures)
from tests.compiler.toys import Toy, traced
from tests.runtime import toys
from thresher.compiler.errors import MissingRequirementError, RefusedError
from thresher.compiler.pipeline import optimize
from thresher.compiler.recipe import load_recipe
from thresher.runtime.backends import backend, cuda, onnx_runtime
from thresher.runtime.exporting import export
from thresher.runtime.manifest import installed, read

BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]
NO_DRIVER = "no NVIDIA driver (libcuda.so.1: cannot open shared object file)"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine for target cuda, made where none can run."""
    monkeypatch.setattr(cuda, "no_gpu", lambda: NO_DRIVER)
    made = toys.engine(tmp_path / "e.engine", keep=5, target="cuda")
    assert set(made.manifest.files) == {"model.onnx"}
    assert made.manifest.requires == {"onnxruntime-gpu": ">=1.18"}
    return made.folder


def flavour(monkeypatch: pytest.MonkeyPatch, providers: list[str], gpu: str = "") -> None:
    """Stand in for an onnxruntime with these providers, and a machine whose GPU lacks ``gpu``."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr(cuda, "no_gpu", lambda: gpu)


@pytest.mark.parametrize(
    ("providers", "gpu", "said"),
    [
        (BOTH[1:], "", "only the providers CPUExecutionProvider; to run it, pip uninstall"),
        (BOTH, NO_DRIVER, NO_DRIVER),
    ],
)
def test_what_is_missing_is_exit_code_4_and_its_reason(
    failed: Callable[..., str],  # noqa: F811
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    providers: list[str],
    gpu: str,
    said: str,
) -> None:
    flavour(monkeypatch, providers, gpu)
    assert said in failed(4, "profile", engine, "--batch", "1")
    state = backend("cuda").available()
    assert (state.ok, bool(state.install)) == (True, not gpu)


def test_a_library_that_does_not_load_is_exit_code_4_with_the_loaders_words(
    failed: Callable[..., str],  # noqa: F811
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flavour(monkeypatch, BOTH)
    monkeypatch.setattr("thresher.runtime.manifest.version", lambda name: "99.0")
    said = failed(4, "profile", engine, "--batch", "1")
    assert "libonnxruntime_providers_cuda.so: cannot open shared object file" in said
    assert "fell back to CPUExecutionProvider" in said


class Session:
    """A session of the CUDA provider that notes how it was opened."""

    asked: tuple[Any, ...] = ()
    failure: Exception | None = None

    def __init__(self, model: str, options: Any, **asked: Any) -> None:
        Session.asked = (model, asked)
        if Session.failure is not None:
            raise Session.failure

    def get_providers(self) -> list[str]:
        return BOTH

    def get_outputs(self) -> list[Any]:
        return []


def test_a_session_takes_float32_as_it_is_and_no_cpu_kernels(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flavour(monkeypatch, BOTH)
    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    given: list[Any] = []
    real = onnx_runtime.session_options

    def options(*asked: Any, **more: Any) -> Any:
        given.append((asked, more))
        return real(*asked, **more)

    monkeypatch.setattr(cuda, "session_options", options)
    session = backend("cuda").open(engine, read(engine), 3)
    assert given == [((3,), {})], "a library of CPU kernels would draw its nodes to the CPU"
    told = {"providers": [(BOTH[0], {"use_tf32": "0"})], "enable_fallback": 0}
    assert Session.asked == (str(engine / "model.onnx"), told)
    assert session.details["provider"] == "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        ("CUDA failure 35: CUDA driver version is insufficient", MissingRequirementError),
        ("[ONNXRuntimeError] : 10 : INVALID_GRAPH : this is an invalid model", RefusedError),
    ],
)
def test_a_device_that_fails_is_no_refused_model(
    engine: Path, monkeypatch: pytest.MonkeyPatch, failure: str, kind: type[Exception]
) -> None:
    flavour(monkeypatch, BOTH)
    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    monkeypatch.setattr(Session, "failure", RuntimeError(failure))
    with pytest.raises(kind, match=failure[-20:]):
        onnx_runtime.open_session(
            engine / "model.onnx", onnx_runtime.session_options(1), "CUDAExecutionProvider"
        )


def test_a_flavour_with_providers_in_libraries_is_not_asked_for_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """onnxruntime-gpu 1.31 ends in a segmentation fault there when a library does not load."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: BOTH)
    monkeypatch.setattr(
        "onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def",
        lambda: pytest.fail("asked"),
    )
    assert onnx_runtime._kernels.__wrapped__() is None
    monkeypatch.setattr(onnx_runtime, "_kernels", lambda: None)
    maker = backend("cuda")
    assert maker.can_take(onnx.helper.make_node("MatMul", ["a", "b"], ["c"]), 20) is None
    assert "no such operator" in str(
        maker.can_take(onnx.helper.make_node("Nope", ["a"], ["c"]), 20)
    )
    nope = onnx.helper.make_node("Nope", ["a"], ["c"], domain="thresher")
    assert "no function body" in str(maker.can_take(nope, 1))


def test_a_flavour_counts_as_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def version(name: str) -> str:
        if name != "onnxruntime-gpu":
            raise PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr("thresher.runtime.manifest.version", version)
    assert installed("onnxruntime") == "1.31.1"
    assert installed("openvino") is None


def test_bfloat16_is_exported_and_checked_where_nothing_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda, "no_gpu", lambda: NO_DRIVER)
    program = optimize(traced(Toy()), load_recipe("tome", ["keep=0.7"]))
    made = export(program, tmp_path / "e", target="cuda", precision="bf16", threads=1)
    stored = onnx.load(tmp_path / "e" / "model.onnx").graph
    assert onnx.TensorProto.BFLOAT16 in {tensor.data_type for tensor in stored.initializer}
    told = made.manifest.verified
    assert told is not None
    assert told["run by"] == "CPUExecutionProvider"
    assert 1e-4 < told["outputs"]["output"]["relative"] < told["tolerance"]
