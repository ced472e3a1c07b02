"""Target tensorrt.  The package cannot be had without NVIDIA's own index and does nothing without a GPU, so
TensorRT-RTX, which has the same interface, builds in its place here; that engine is not run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.compiler.toys import TOKENS, WIDTH, Toy, traced
from thresher.compiler.errors import MissingRequirementError
from thresher.runtime import Engine, export
from thresher.runtime.backends import backend, nvidia, tensorrt, tensorrt_family
from thresher.runtime.backends.nvidia import Gpu

rtx = pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'thresher[tensorrt-rtx]'"
)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a GPU and TensorRT whose Python cannot reach the GPU's memory."""
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    for module in (tensorrt, tensorrt_family):
        monkeypatch.setattr(module, "no_gpu", lambda: "")
        monkeypatch.setattr(module, "gpu", lambda: Gpu("NVIDIA Card 1 (PCIe)", "sm89", "13.0"))
    monkeypatch.setattr(tensorrt_family, "free_memory", lambda: 1 << 30)
    monkeypatch.setattr(tensorrt_family, "no_bindings", lambda extra: f"no bindings of {extra}")
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def built(folder: Path) -> Engine:
    shape = [f"x=1..4x{TOKENS}x{WIDTH}"]
    return export(traced(Toy()), folder, target="tensorrt", threads=1, shapes=shape)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations:DeprecationWarning")
def test_an_engine_is_bound_to_its_gpu_and_version_and_timings_are_kept(
    cache: Path, tmp_path: Path
) -> None:
    engine = built(tmp_path / "e")
    assert set(engine.manifest.files) == {"model.onnx", "tensorrt.engine"}
    assert engine.manifest.requires == {"tensorrt": f"=={rtx.__version__}"}
    assert engine.manifest.built["gpu"] == {"name": "NVIDIA Card 1 (PCIe)", "capability": "sm89"}
    (timings,) = (cache / "timing").iterdir()
    assert timings.name == f"nvidia-card-1-pcie-{rtx.__version__}.cache"
    kept = timings.read_bytes()
    assert kept
    timings.write_bytes(b"damaged")
    built(tmp_path / "again")
    assert timings.read_bytes() == kept
    assert "no bindings of tensorrt" in backend("tensorrt").available().reason


@pytest.mark.filterwarnings("ignore:.*Timing cache operations:DeprecationWarning")
def test_an_engine_of_another_gpu_is_told_before_it_is_loaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = built(tmp_path / "e")
    monkeypatch.setattr(tensorrt, "gpu", lambda: Gpu("Card 2", "sm120", "13.0"))
    said = (
        r"built for NVIDIA Card 1 .* \(sm89\) and this GPU is Card 2 \(sm120\): rebuild with 'thr"
    )
    with pytest.raises(MissingRequirementError, match=said):
        backend("tensorrt").open(engine.folder, engine.manifest, 1)


def test_it_builds_only_where_there_is_a_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "no_gpu", lambda: "no NVIDIA driver (libcuda.so.1)")
    maker = backend("tensorrt")
    with pytest.raises(MissingRequirementError, match=r"libcuda.so.1\).*or take tensorrt-rtx"):
        maker.demand()
    node = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    assert maker.can_take(node, 20) is None, "what it takes is known without it"


class Driver:
    """libcuda of a machine with ``count`` GPUs of compute capability 9.0."""

    def __init__(self, count: int, status: int = 0) -> None:
        self.count, self.status = count, status

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: int) -> int:
        name.value = b"Card"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0


@pytest.mark.parametrize(
    ("driver", "answer"),
    [
        (Driver(1), Gpu("Card", "sm90", "13.1")),
        (Driver(0), "the NVIDIA driver sees no GPU"),
        (Driver(1, status=999), "the NVIDIA driver does not start (CUDA error 999)"),
    ],
)
def test_the_driver_is_asked(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, answer: object
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    assert nvidia._ask() == answer
