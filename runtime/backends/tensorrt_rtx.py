"""TensorRT-RTX: engines for NVIDIA RTX GPUs, built ahead of time on any machine, also without a GPU.

``tensorrt-rtx`` builds one portable engine (Ampere and later), ``tensorrt-rtx:sm86+sm89+sm120`` one
for these GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from thresher.runtime.backends.base import Availability
from thresher.runtime.backends.nvidia import gpu, no_gpu
from thresher.runtime.backends.tensorrt_family import PLUGINS, TensorRtFamily

if TYPE_CHECKING:
    import onnx

PLAN = "tensorrt-rtx.engine"


class TensorRtRtx(TensorRtFamily):
    """Ahead-of-time builds with TensorRT-RTX, which compiles them for the GPU when they are loaded."""

    target = "tensorrt-rtx"
    summary = "TensorRT-RTX, built ahead of time"
    package = "tensorrt_rtx"
    install = "pip install 'thresher[tensorrt-rtx]'"
    prefix = "tensorrt-rtx."
    title, plan = "TensorRT-RTX", PLAN

    @property
    def capabilities(self) -> tuple[str, ...]:
        return tuple(one for one in self.chosen if one != PLUGINS)

    def available(self) -> Availability:
        state = super().available()
        if not state.ok:
            return state
        known = _capabilities()
        wrong = [one for one in self.capabilities if one not in known]
        if wrong:
            reason = f"{wrong[0]} is none of {', '.join(known)}"
            return Availability(False, state.version, reason, "choose one of these")
        return Availability(True, state.version, self.cannot_run())

    def cannot_run(self) -> str:
        reason = no_gpu() or self._unfit() or super().cannot_run()
        return f"it builds engines here and runs none: {reason}" if reason else ""

    def _unfit(self) -> str:
        """Why this GPU runs no such engine, or nothing."""
        found = gpu()
        if found is None:
            return ""
        named = f"{found.name} ({found.capability})"
        if found.capability not in _capabilities():
            return f"TensorRT-RTX knows {', '.join(_capabilities())} and this GPU is {named}"
        if self.capabilities and found.capability not in self.capabilities:
            return f"they are for {', '.join(self.capabilities)} and this GPU is {named}"
        return ""

    def requires(self, model: onnx.ModelProto) -> dict[str, str]:
        release = str(self.available().version).split(".")
        return {"tensorrt-rtx": f"=={'.'.join(release[:2])}"}  # engines hold for one minor release

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        if self.capabilities:
            config.num_compute_capabilities = len(self.capabilities)
            for index, name in enumerate(self.capabilities):
                chosen = getattr(self.trt.ComputeCapability, name.upper())
                config.set_compute_capability(chosen, index)
        yield


@cache
def _capabilities() -> tuple[str, ...]:
    import tensorrt_rtx as trt

    names = trt.ComputeCapability.__members__
    return tuple(name.lower() for name in names if name.startswith("SM"))
