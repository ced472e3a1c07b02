"""Back ends by target name.  Each is one file; importing this package loads none of them."""

from __future__ import annotations

import importlib

from thresher.compiler.errors import UsageError, nearest
from thresher.runtime.backends.base import Array, Availability, Backend, Feeds, Problem, Session

__all__ = ["TARGETS", "Array", "Availability", "Backend", "Feeds", "Problem", "Session", "backend"]

TARGETS = {
    "cpu": "thresher.runtime.backends.cpu:OnnxRuntimeCpu",
    "cuda": "thresher.runtime.backends.cuda:OnnxRuntimeCuda",
    "jetson-orin": "thresher.runtime.backends.jetson:JetsonOrin",
    "jetson-thor": "thresher.runtime.backends.jetson:JetsonThor",
    "openvino": "thresher.runtime.backends.openvino:OpenVino",
    "tensorrt": "thresher.runtime.backends.tensorrt:TensorRt",
    "tensorrt-rtx": "thresher.runtime.backends.tensorrt_rtx:TensorRtRtx",
}


def backend(target: str) -> Backend:
    """The back end of a target, such as ``"cpu"`` or ``"tensorrt-rtx:sm86+sm89"``.

    Raises:
        UsageError: no such target, whose nearest name is given, or nothing to choose in it.
    """
    kind, _, choice = target.partition(":")
    if kind not in TARGETS:
        raise UsageError(f"there is no target {kind!r}{nearest(kind, TARGETS)}")
    module, _, name = TARGETS[kind].partition(":")
    made = getattr(importlib.import_module(module), name)(choice)
    assert isinstance(made, Backend)
    return made
