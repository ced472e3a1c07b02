"""ONNX Runtime on an NVIDIA GPU.  The engine is ``model.onnx``, so it can be made anywhere."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from thresher.runtime.backends.base import Availability, Problem, problem
from thresher.runtime.backends.bfloat16 import without_kernel
from thresher.runtime.backends.nvidia import free_memory, gpu, no_gpu
from thresher.runtime.backends.onnx_runtime import (
    OnnxRuntime,
    OrtSession,
    open_session,
    session_options,
)
from thresher.runtime.manifest import MODEL, Manifest

if TYPE_CHECKING:
    import onnx

PROVIDER = "CUDAExecutionProvider"
FLAVOUR = "onnxruntime-gpu"
# With both flavours installed the one that was written last wins, which pip does not choose.
INSTALL = f"pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps {FLAVOUR}"
ONLY_EXPORTS = "it exports engines here and runs none"
SETTINGS = {"use_tf32": "0"}  # fp32 means float32: TF32 has the mantissa of fp16


class OnnxRuntimeCuda(OnnxRuntime):
    """ONNX Runtime with the CUDA provider, with full float32 arithmetic for fp32 engines."""

    target = "cuda"
    summary = "ONNX Runtime on NVIDIA GPUs"
    install = INSTALL
    provider = PROVIDER
    precisions = ("fp32", "fp16", "bf16")
    multiple = 8  # rows of a tile of the matrix units

    def available(self) -> Availability:
        state = super().available()
        if not state.ok or not (reason := _lacking()):
            return state
        remedy = self.install if reason != no_gpu() else ""
        return Availability(True, state.version, f"{ONLY_EXPORTS}: {reason}", remedy)

    def cannot_run(self) -> str:
        reason = _lacking()
        if reason and reason != no_gpu():
            reason = f"{reason}; to run it, {INSTALL}"
        return f"{ONLY_EXPORTS}: {reason}" if reason else ""

    def free_memory(self) -> int | None:
        return free_memory()

    def problems(self, model: onnx.ModelProto) -> list[Problem]:
        """Kernels of the CPU stand in for any that the provider lacks, but not in bfloat16."""
        return super().problems(model) + [
            problem(node, body, f"ONNX Runtime's CUDA provider has no bfloat16 {node.op_type}")
            for node, body in without_kernel(model)
        ]

    def requires(self, model: onnx.ModelProto) -> dict[str, str]:
        return {FLAVOUR: super().requires(model)[self.package]}

    def open(self, folder: Path, manifest: Manifest, threads: int) -> OrtSession:
        preload()
        session = open_session(folder / MODEL, session_options(threads), PROVIDER, SETTINGS)
        found = gpu()
        details = {
            "provider": PROVIDER,
            "gpu": found.name if found else "unknown",
            "threads": str(threads),
            "kernels": "function bodies",
        }
        return OrtSession(session, details)


def preload() -> None:
    """Load the CUDA libraries that were installed as packages (torch brings them), if there are any."""
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()


def _lacking() -> str:
    """What running needs and this machine has not, or nothing."""
    import onnxruntime as ort

    found = ort.get_available_providers()
    if PROVIDER not in found:
        return f"this onnxruntime has only the providers {', '.join(found)}"
    return no_gpu()
