"""What TensorRT and TensorRT-RTX share as back ends.  Graphs are strongly typed: the precision is
that of ``model.onnx``, no builder flag changes it.

``plugins`` in the target (``tensorrt-rtx:plugins``) puts our CUDA kernels in place of the function bodies;
such an engine loads only where the plugins are.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from thresher.compiler.errors import MissingRequirementError, UsageError
from thresher.kernels.cuda_library import CUDA, Kernels
from thresher.kernels.native import KernelError, Library
from thresher.kernels.tensorrt_plugins import registered
from thresher.runtime.backends import tensorrt_build as building
from thresher.runtime.backends.base import Availability, Backend, Session, Tell, silent
from thresher.runtime.backends.cuda_memory import CudaMemory, no_bindings
from thresher.runtime.backends.nvidia import free_memory, gpu, no_gpu
from thresher.runtime.backends.tensorrt_run import TensorRtSession
from thresher.runtime.feeds import PLUS
from thresher.runtime.manifest import MODEL, Manifest, Ranges, TensorInfo, digest

if TYPE_CHECKING:
    import onnx

PLUGINS = "plugins"
# Operators that the parser takes and the builder does not, or not in this form.
REFUSED = {
    "NonZero": "its output has a size that depends on data",
    "Compress": "its output has a size that depends on data",
    "Unique": "its output has a size that depends on data",
    "BitwiseAnd": "it has no such operator",
}


class TensorRtFamily(Backend):
    """A back end whose package has TensorRT's interface."""

    title: ClassVar[str]
    plan: ClassVar[str]  # the file that it builds
    precisions = ("fp32", "fp16", "int8")
    multiple = 8  # rows of a tile of the matrix units
    choices = cached = True

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(self.choice.lower().split("+")) if self.choice else ()

    def available(self) -> Availability:
        state = super().available()
        reason = _no_kernels() if PLUGINS in self.chosen else ""
        if not state.ok or not reason:
            return state
        return Availability(False, state.version, reason, "thresher kernels build --for cuda")

    @property
    def trt(self) -> Any:
        """The package."""
        return importlib.import_module(self.package)

    def cannot_run(self) -> str:
        return no_gpu() or no_bindings(self.target)

    def free_memory(self) -> int | None:
        return free_memory()

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
        shapes = {spec.name: spec.shape for spec in specs}
        asked = {
            spec.name: [
                ranges.get(a, (1, None)) if isinstance(a, str) else (a, a) for a in spec.shape
            ]
            for spec in specs
        }
        open_axes = dict.fromkeys(
            axis
            for spec in specs
            for axis, (_, high) in zip(spec.shape, asked[spec.name], strict=True)
            if high is None and PLUS not in str(axis)
        )
        if open_axes:
            texts = (
                f"--shape {name}={_suggested(bounds)}"
                for name, bounds in asked.items()
                if any(axis in open_axes for axis in shapes[name])
                and not any(PLUS in str(axis) for axis in shapes[name])  # others tell its parts
            )
            raise UsageError(
                f"target {self.name!r} has to know the largest size of"
                f" {' and '.join(map(str, open_axes))}: give for example {' '.join(texts)}"
            )

    def fingerprint(self) -> dict[str, str]:
        plugins = {"plugins": digest(Library(kind=CUDA).file)} if PLUGINS in self.chosen else {}
        return {**super().fingerprint(), **plugins}

    def build(self, folder: Path, manifest: Manifest, tell: Tell = silent) -> dict[str, Any]:
        trt, log = self.trt, building.logger(self.trt)
        builder = trt.Builder(log)
        with self._kernels() as kernels:
            network = building.parsed(trt, builder, folder / MODEL, log, self.title)
            config = builder.create_builder_config()
            config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means float32
            building.add_profile(builder, config, manifest)
            with self.configured(config):
                made = building.serialized(trt, builder, network, config, log, self.title, tell)
            (folder / self.plan).write_bytes(made)
            return {
                "layers": building.layers(network),
                "bytes": log.memory(),
                **building.steps(trt, network),
                **({"plugin library": digest(kernels)} if kernels else {}),
                **self.built_for(),
            }

    @contextmanager
    def _kernels(self) -> Iterator[Path | None]:
        """Our plugins are known to TensorRT meanwhile, where they are chosen; yields their library."""
        if PLUGINS not in self.chosen:
            yield None
            return
        library = Library(kind=CUDA).file
        try:
            with registered(self.trt, Kernels(library)):
                yield library
        except KernelError as error:
            raise MissingRequirementError(str(error)) from error

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """Set what this package has beyond the common, for the time of a build."""
        yield

    def built_for(self) -> dict[str, Any]:
        """What the manifest tells of the hardware that the engine is bound to."""
        return {}

    def open(self, folder: Path, manifest: Manifest, threads: int) -> Session:
        found = gpu()
        details = {
            "provider": f"{self.title} {self.available().version}",
            "gpu": found.name if found else "unknown",
            "threads": str(threads),
        }
        plan = folder / self.plan
        with ExitStack() as stack:
            stack.enter_context(self._kernels())
            session = TensorRtSession(self.trt, CudaMemory(), plan, self.title, details)
            session.held = stack.pop_all()  # a plugin may be looked up again at the first run
            return session


def _no_kernels() -> str:
    """Why there are no plugins here, or nothing."""
    try:
        return "" if Library(kind=CUDA).find() else "the CUDA kernels are not built"
    except KernelError as error:
        return str(error)


def _suggested(bounds: Sequence[tuple[int, int | None]]) -> str:
    """Sizes that ``--shape`` could give: 1 to 32 and usually 8 for an axis that is open."""
    sizes = "x".join(
        f"{low}..{max(low, 32) if high is None else high}" if low != high else str(low)
        for low, high in bounds
    )
    usual = "x".join(str(max(low, 8)) for low, high in bounds if low != high)
    return f"{sizes}@{usual}"
