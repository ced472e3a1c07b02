"""OpenVINO on the CPU, with native kernels where they are built.

It knows no model-local functions, so they are inlined when building.  The kernels are taken when an engine is
opened, which then reads ``model.onnx`` itself.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thresher.compiler.errors import MissingRequirementError, RefusedError
from thresher.kernels.native import SWITCH, KernelError, wanted
from thresher.kernels.operator import DOMAIN
from thresher.runtime.backends.base import Array, Backend, Feeds, Tell, silent
from thresher.runtime.backends.trial import trial
from thresher.runtime.host import free_memory, lacks_vnni
from thresher.runtime.manifest import MODEL, Manifest

if TYPE_CHECKING:
    import onnx
    import openvino as ov

log = logging.getLogger("thresher")
DEVICE = "CPU"
IR = "openvino.xml"
WEIGHTS = "openvino.bin"
OPERATORS = "operators"  # in what a build tells: those of ours that the graph has


class OpenVino(Backend):
    """OpenVINO's CPU plugin, with full float32 arithmetic for fp32 engines."""

    target = "openvino"
    summary = "OpenVINO on the CPU"
    package = "openvino"
    install = "pip install 'thresher[openvino]'"
    prefix = "openvino."
    precisions = ("fp32", "fp16", "bf16", "int8")
    cached = True

    def graph_precision(self, precision: str) -> str:
        if precision == "bf16":
            return "fp32"  # OpenVINO rounds when it compiles
        return super().graph_precision(precision)

    def can_take(self, node: onnx.NodeProto, opset: int) -> str | None:
        if node.domain not in ("", "ai.onnx.ml", "com.microsoft"):
            return "no conversion rule for its domain and no function body of that name"
        if node.op_type.startswith("Scatter") and _reduction(node) == "mean":
            return "the reduction 'mean' is not ONNX"
        return None

    def requires(self, model: onnx.ModelProto) -> dict[str, str]:
        import openvino as ov

        release = ov.__version__.split("-")[0]
        return {"openvino": f">={release}"}  # an older release may lack an operator of the IR

    def free_memory(self) -> int | None:
        return free_memory()

    def build(self, folder: Path, manifest: Manifest, tell: Tell = silent) -> dict[str, Any]:
        import onnx
        import openvino as ov

        from thresher.compiler.lowering.inline import inlined

        model = onnx.load(folder / MODEL, load_external_data=False)
        flat = folder / "inlined.onnx"  # weights beside model.onnx are shared with it
        onnx.save(inlined(model), flat)
        try:
            read = ov.Core().read_model(flat)
        except RuntimeError as error:
            raise RefusedError(f"OpenVINO does not take the model: {_reason(error)}") from error
        ov.save_model(read, folder / IR, compress_to_fp16=False)
        flat.unlink()
        return {OPERATORS: sorted(f.name for f in model.functions if f.domain == DOMAIN)}

    def open(self, folder: Path, manifest: Manifest, threads: int) -> OpenVinoSession:
        kernels = kernel_library() if _takes_kernels(manifest) else None
        return OpenVinoSession(folder / (MODEL if kernels else IR), manifest, threads, kernels)


def kernel_library() -> Path | None:
    """The native kernels that sessions load here, or None where the function bodies run.

    Raises:
        MissingRequirementError: they are damaged.
    """
    from thresher.kernels.openvino_library import extension

    try:
        kind = extension()
    except KernelError:
        return None  # nothing to build them for, so nobody has
    try:
        return wanted(kind)
    except KernelError as error:
        raise MissingRequirementError(f"{error}, or set {SWITCH}=off") from error


def try_kernels(library: Path) -> None:
    """Load the library and run one operator with it.

    Raises:
        MissingRequirementError: it cannot be loaded.
    """
    core = core_with(library)

    def run(model: bytes, feeds: Feeds) -> Array:
        return np.asarray(core.compile_model(core.read_model(model), DEVICE)(dict(feeds))[0])

    trial(library, run)


def _takes_kernels(manifest: Manifest) -> bool:
    """Whether the graph has operators of ours, and kernels for all of them."""
    from thresher.kernels.openvino_library import TAKEN

    operators = set(manifest.built.get(OPERATORS, ()))
    return bool(operators) and operators <= set(TAKEN)


class OpenVinoSession:
    """One compiled model with one request.

    Where an axis has one size, the model is compiled for it: OpenVINO works out the shapes of all
    nodes anew at every run of a model with symbolic axes, which costs more than the inserted steps do.
    """

    def __init__(
        self, model: Path, manifest: Manifest, threads: int, kernels: Path | None = None
    ) -> None:
        core = core_with(kernels)
        hint = _hint(core, manifest.precision)
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        try:
            read = core.read_model(model)
            if manifest.fixed:
                read.reshape(_fixed_shapes(manifest))
            if hint == "bf16":
                _narrow(read)
            compiled = core.compile_model(read, DEVICE, settings)
        except RuntimeError as error:
            raise RefusedError(f"OpenVINO refuses {model}: {_reason(error)}") from error
        if manifest.precision == "int8" and lacks_vnni():
            _warn_of_overflow()
        self.details = {
            "provider": f"OpenVINO {DEVICE}",
            "threads": str(threads),
            "arithmetic": f"int8 and {hint}" if manifest.precision == "int8" else hint,
            "kernels": "native" if kernels else "function bodies",
        }
        self._outputs = {spec.name: compiled.output(spec.name) for spec in manifest.outputs}
        self._request: Any = compiled.create_infer_request()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        assert self._request is not None, "the engine is closed"
        # Inputs are read in place; outputs are copied, as the request reuses its buffers.
        results = self._request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        return {name: results[port] for name, port in self._outputs.items()}

    def close(self) -> None:
        self._request = None


def core_with(kernels: Path | None) -> Any:
    """OpenVINO, with a library of native kernels.

    Raises:
        MissingRequirementError: the library cannot be loaded.
    """
    import openvino as ov

    from thresher.kernels.openvino_library import PROCESSOR

    core = ov.Core()
    if kernels is not None:
        try:
            core.add_extension(str(kernels))
        except RuntimeError as error:
            raise MissingRequirementError(
                f"the kernels {kernels} cannot be loaded ({_reason(error)}): run thresher kernels build"
                f" --force --for {PROCESSOR}, or set {SWITCH}=off"
            ) from error
    return core


def _narrow(model: ov.Model) -> None:
    """Give nodes of ours bfloat16 tokens, as their neighbours will have.

    The plugin rounds only what it knows, and would widen and round again around each of them.
    """
    import openvino.opset15 as opset

    from thresher.kernels.openvino_library import TAKEN

    for node in model.get_ordered_ops():
        operator = TAKEN.get(node.get_type_name())
        if operator is None:
            continue
        for read, kind in zip(node.inputs(), operator.inputs.values(), strict=True):
            if kind == "T":
                narrow = opset.convert(read.get_source_output(), "bf16")
                read.replace_source_output(narrow.output(0))
        node.validate_and_infer_types()
        for made, kind in zip(node.outputs(), operator.outputs.values(), strict=False):
            if kind == "T":
                readers = made.get_target_inputs()
                wide = opset.convert(made, "f32").output(0)
                wide.set_names(made.get_names())
                made.set_names(set())
                for reader in readers:
                    reader.replace_source_output(wide)


def _fixed_shapes(manifest: Manifest) -> dict[str, list[int]]:
    """Shapes by input, -1 for an axis that stays symbolic."""
    sizes = manifest.fixed
    return {
        spec.name: [axis if isinstance(axis, int) else sizes.get(axis, -1) for axis in spec.shape]
        for spec in manifest.inputs
    }


@cache  # an export opens its engine twice
def _warn_of_overflow() -> None:
    log.warning(
        "this processor has no VNNI: OpenVINO's int8 sums may overflow on it, and are no faster than"
        " float32; engines of target 'cpu' avoid that"
    )


def _hint(core: Any, precision: str) -> str:
    """Arithmetic asked for: half only where the CPU has it, as fp16 also means small weights.

    Raises:
        MissingRequirementError: bf16 is asked for, which says nothing of the weights, and the CPU lacks it.
    """
    able = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16":
        if "BF16" not in able:
            raise MissingRequirementError(
                f"this CPU has no bfloat16 arithmetic (it has {', '.join(able)}): export with"
                " --precision fp32"
            )
        return "bf16"
    return "f16" if precision == "fp16" and "FP16" in able else "f32"


def _reduction(node: onnx.NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")


def _reason(error: Exception) -> str:
    """The last non-empty line: OpenVINO puts source positions first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
