"""TensorRT-RTX: engines for NVIDIA RTX GPUs, built ahead of time on any machine, also without a GPU.

``tensorrt-rtx`` builds one portable engine (Ampere and later), ``tensorrt-rtx:sm86+sm89+sm120`` one
for these GPUs.  Graphs are strongly typed: the precision is that of ``model.onnx``, no builder flag
changes it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import MissingRequirementError, RefusedError, UsageError
from thresher.runtime.backends.base import Availability, Backend, Session
from thresher.runtime.manifest import MODEL, Manifest, Ranges, TensorInfo

if TYPE_CHECKING:
    import onnx

PLAN = "tensorrt-rtx.engine"
# Operators that the parser takes and the builder does not, or not in this form.
REFUSED = {
    "NonZero": "its output has a size that depends on data",
    "Compress": "its output has a size that depends on data",
    "Unique": "its output has a size that depends on data",
    "BitwiseAnd": "it has no such operator",
}
MEMORY = {  # lines of the builder's log, in bytes
    "weights": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "activations": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "scratch": re.compile(r"Max Scratch Memory: (\d+) bytes"),
}


class TensorRtRtx(Backend):
    """Ahead-of-time builds with TensorRT-RTX."""

    target = "tensorrt-rtx"
    summary = "TensorRT-RTX, built ahead of time"
    package = "tensorrt_rtx"
    install = "pip install 'thresher[tensorrt-rtx]'"
    prefix = "tensorrt-rtx."
    precisions = ("fp32", "fp16", "int8")
    choices = True
    multiple = 8  # rows of a tile of the matrix units

    @property
    def capabilities(self) -> tuple[str, ...]:
        return tuple(self.choice.upper().split("+")) if self.choice else ()

    def available(self) -> Availability:
        state = super().available()
        if not state.ok:
            return state
        known = _capabilities()
        wrong = [one for one in self.capabilities if one not in known]
        if wrong:
            reason = f"{wrong[0].lower()} is none of {', '.join(known).lower()}"
            return Availability(False, state.version, reason, "choose one of these")
        return Availability(True, state.version, self.cannot_run())

    def cannot_run(self) -> str:
        reason = _no_gpu() or "thresher has no runner for it yet, load them with TensorRT-RTX's own"
        return f"it builds engines here and runs none: {reason}"

    def can_take(self, node: onnx.NodeProto, opset: int) -> str | None:
        if node.domain:
            return "no plugin and no function body of that name"
        if node.op_type in REFUSED:
            return REFUSED[node.op_type]
        reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
        if node.op_type.startswith("Scatter") and reduction != "none":
            return f"it scatters with the reduction {reduction!r}"
        return None

    def check_shapes(self, specs: Sequence[TensorInfo], ranges: Ranges) -> None:
        for spec in specs:
            bounds = [
                ranges.get(a, (1, None)) if isinstance(a, str) else (a, a) for a in spec.shape
            ]
            unbounded = [a for a, (_, high) in zip(spec.shape, bounds, strict=True) if high is None]
            if unbounded:
                sizes = "x".join(
                    f"{low}..32" if high is None else f"{low}..{high}" if low < high else str(low)
                    for low, high in bounds
                )
                usual = "x".join("8" for low, high in bounds if low != high)
                raise UsageError(
                    f"target {self.name!r} has to know the largest size of {unbounded[0]}: give for"
                    f" example --shape {spec.name}={sizes}@{usual}"
                )

    def requires(self, model: onnx.ModelProto) -> dict[str, str]:
        release = str(self.available().version).split(".")
        return {"tensorrt-rtx": f"=={'.'.join(release[:2])}"}  # engines hold for one minor release

    def build(self, folder: Path, manifest: Manifest) -> dict[str, Any]:
        import tensorrt_rtx as trt

        log = _log()
        builder = trt.Builder(log)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(folder / MODEL)):
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise RefusedError(f"TensorRT-RTX does not take the model: {reasons[0]}")
        config = builder.create_builder_config()
        if self.capabilities:
            config.num_compute_capabilities = len(self.capabilities)
            for index, name in enumerate(self.capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        if any(isinstance(axis, str) for spec in manifest.inputs for axis in spec.shape):
            profile = builder.create_optimization_profile()
            for spec in manifest.inputs:
                profile.set_shape(spec.name, *_bounds(spec.shape, manifest))
            config.add_optimization_profile(profile)
        made = builder.build_serialized_network(network, config)
        if made is None:
            raise RefusedError(f"TensorRT-RTX cannot build the model: {log.reason}")
        (folder / PLAN).write_bytes(made)
        return {"layers": _layers(network), "bytes": log.memory(), "steps": "function bodies"}

    def open(self, folder: Path, manifest: Manifest, threads: int) -> Session:
        raise MissingRequirementError(f"{folder} cannot be run: {self.cannot_run()}")


def _bounds(
    shape: tuple[int | str, ...], manifest: Manifest
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Least, usual and largest shape of an input; without a usual size the largest is tuned for."""
    axes: list[tuple[int, int, int]] = []
    for axis in shape:
        if isinstance(axis, int):
            axes.append((axis, axis, axis))
        else:
            low, high = manifest.ranges[axis]
            assert high is not None
            axes.append((low, manifest.usual.get(axis, high), high))
    least, usual, largest = (tuple(sizes[i] for sizes in axes) for i in range(3))
    return least, usual, largest


def _layers(network: Any) -> dict[str, int]:
    """How many layers of the parsed network compute in each type."""
    counts: dict[str, int] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs:
            kind = str(layer.get_output(0).dtype).rpartition(".")[2].lower()
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def _log() -> Any:
    """A logger that keeps what is said about errors and memory."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif " Memory: " in message:
                self.kept.append(message)

        @property
        def reason(self) -> str:
            said = self.errors[0] if self.errors else "its log gives no reason"
            return re.sub(r"^.*?Error Code \d+: ", "", said).splitlines()[0]

        def memory(self) -> dict[str, int]:
            text = "\n".join(self.kept)
            found = {name: pattern.search(text) for name, pattern in MEMORY.items()}
            return {name: int(match[1]) for name, match in found.items() if match}

    return Log()


@cache
def _capabilities() -> tuple[str, ...]:
    import tensorrt_rtx as trt

    return tuple(name for name in trt.ComputeCapability.__members__ if name.startswith("SM"))


@cache
def _no_gpu() -> str:
    """Why no NVIDIA GPU can be used here, or nothing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no NVIDIA driver ({error})"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver sees no GPU"
    return ""
