"""TensorRT 10 and 11: engines built on the GPU that runs them, by timing every layer there.

What was timed is kept in ``$THRESHER_CACHE/timing``, by GPU and version, so that the next build of a like
model asks the GPU less.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import MissingRequirementError
from thresher.compiler.files import atomic_file
from thresher.kernels.native import cache
from thresher.runtime.backends.base import Availability, Session
from thresher.runtime.backends.nvidia import gpu, no_gpu
from thresher.runtime.backends.tensorrt_family import PLUGINS, TensorRtFamily
from thresher.runtime.manifest import Manifest

if TYPE_CHECKING:
    import onnx


class TensorRt(TensorRtFamily):
    """Builds with TensorRT."""

    target = "tensorrt"
    summary = "TensorRT, built on the GPU"
    package = "tensorrt"
    install = "pip install 'thresher[tensorrt]'"
    prefix = "tensorrt."
    title, plan = "TensorRT", "tensorrt.engine"

    def available(self) -> Availability:
        state = super().available()
        if not state.ok:
            return state
        version = str(self.trt.__version__)
        wrong = [one for one in self.chosen if one != PLUGINS]
        if wrong:
            return Availability(False, version, f"{wrong[0]!r} is none of {PLUGINS}", "choose that")
        if reason := no_gpu():
            remedy = "build on the GPU that will run it, or take tensorrt-rtx, which needs none"
            return Availability(False, version, reason, remedy)
        return Availability(True, version, self.cannot_run())

    def requires(self, model: onnx.ModelProto) -> dict[str, str]:
        return {"tensorrt": f"=={self.trt.__version__}"}  # engines hold for one version

    def fingerprint(self) -> dict[str, str]:
        found = gpu()
        device = {"GPU": found.name, "driver": found.driver} if found else {}
        return {**super().fingerprint(), **device}

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        free = self.free_memory()
        if free is not None:
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, free)
        file = timing_file(str(self.trt.__version__))
        for kept in (file.read_bytes() if file.is_file() else b"", b""):
            timings = config.create_timing_cache(kept)
            if timings is not None and config.set_timing_cache(timings, False):
                break  # else it is another machine's, or damaged
        yield
        with atomic_file(file) as partial:
            partial.write_bytes(config.get_timing_cache().serialize())

    def built_for(self) -> dict[str, Any]:
        found = gpu()
        assert found is not None, "available() has asked for one"
        return {"gpu": {"name": found.name, "capability": found.capability}}

    def open(self, folder: Path, manifest: Manifest, threads: int) -> Session:
        found, made = gpu(), manifest.built["gpu"]
        if found is None or found.capability != made["capability"]:
            here = f"{found.name} ({found.capability})" if found else no_gpu()
            raise MissingRequirementError(
                f"{folder} was built for {made['name']} ({made['capability']}) and this GPU is"
                f" {here}: rebuild with {manifest.rebuild(folder)}"
            )
        return super().open(folder, manifest, threads)


def timing_file(version: str) -> Path:
    """Where the timings of this GPU and a version of TensorRT are kept."""
    found = gpu()
    name = re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-") if found else "unknown"
    return cache().parent / "timing" / f"{name}-{version}.cache"
