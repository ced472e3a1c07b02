"""ONNX Runtime on the CPU: the default target, with native kernels where they are built."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from thresher.compiler.errors import MissingRequirementError
from thresher.kernels.native import SWITCH, KernelError, wanted
from thresher.runtime.backends.base import Array, Availability, Feeds
from thresher.runtime.backends.onnx_runtime import (
    CPU,
    OnnxRuntime,
    OrtSession,
    open_session,
    session_options,
)
from thresher.runtime.backends.trial import trial
from thresher.runtime.host import free_memory
from thresher.runtime.manifest import MODEL, Manifest


class OnnxRuntimeCpu(OnnxRuntime):
    """ONNX Runtime with the CPU provider."""

    target = "cpu"
    summary = "ONNX Runtime on the CPU"
    install = "pip install onnxruntime"
    provider = CPU
    precisions = ("fp32", "fp16", "int8")
    branches = True  # only products of the graph have their weights packed once

    def available(self) -> Availability:
        state = super().available()
        if not state.ok:
            return state
        import onnxruntime as ort

        found = ort.get_available_providers()
        if CPU not in found:
            reason = f"this onnxruntime has only the providers {', '.join(found)}"
            return Availability(False, state.version, reason, self.install)
        return state

    def free_memory(self) -> int | None:
        return free_memory()

    def open(self, folder: Path, manifest: Manifest, threads: int) -> OrtSession:
        kernels = kernel_library()
        details = {
            "provider": CPU,
            "threads": str(threads),
            "kernels": "native" if kernels else "function bodies",
        }
        session = open_session(folder / MODEL, session_options(threads, kernels))
        return OrtSession(session, details)


def kernel_library() -> Path | None:
    """The native kernels that sessions load here, or None where the function bodies run.

    Raises:
        MissingRequirementError: they are damaged.
    """
    try:
        return wanted()
    except KernelError as error:
        raise MissingRequirementError(f"{error}, or set {SWITCH}=off") from error


def try_kernels(library: Path) -> None:
    """Load the library and run one operator with it.

    Raises:
        MissingRequirementError: it cannot be loaded.
    """
    import onnxruntime as ort

    options = session_options(1, library)

    def run(model: bytes, feeds: Feeds) -> Array:
        session = ort.InferenceSession(model, options, providers=[CPU])
        return np.asarray(session.run(None, dict(feeds))[0])

    trial(library, run)
