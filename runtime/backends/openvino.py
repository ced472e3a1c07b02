"""OpenVINO on the CPU.  It knows no model-local functions, so they are inlined when building."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import MissingRequirementError, RefusedError
from thresher.runtime.backends.base import Array, Backend, Feeds, Tell, silent
from thresher.runtime.host import free_memory
from thresher.runtime.manifest import MODEL, Manifest

if TYPE_CHECKING:
    import onnx

DEVICE = "CPU"
IR = "openvino.xml"
WEIGHTS = "openvino.bin"


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

        flat = folder / "inlined.onnx"  # weights beside model.onnx are shared with it
        onnx.save(inlined(onnx.load(folder / MODEL, load_external_data=False)), flat)
        try:
            read = ov.Core().read_model(flat)
        except RuntimeError as error:
            raise RefusedError(f"OpenVINO does not take the model: {_reason(error)}") from error
        ov.save_model(read, folder / IR, compress_to_fp16=False)
        flat.unlink()
        return {}

    def open(self, folder: Path, manifest: Manifest, threads: int) -> OpenVinoSession:
        return OpenVinoSession(folder / IR, manifest, threads)


class OpenVinoSession:
    """One compiled model with one request.

    Where an axis has one size, the model is compiled for it: OpenVINO works out the shapes of all
    nodes anew at every run of a model with symbolic axes, which costs more than the inserted steps do.
    """

    def __init__(self, model: Path, manifest: Manifest, threads: int) -> None:
        import openvino as ov

        core = ov.Core()
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
            compiled = core.compile_model(read, DEVICE, settings)
        except RuntimeError as error:
            raise RefusedError(f"OpenVINO refuses {model}: {_reason(error)}") from error
        self.details = {
            "provider": f"OpenVINO {DEVICE}",
            "threads": str(threads),
            "arithmetic": f"int8 and {hint}" if manifest.precision == "int8" else hint,
        }
        self._outputs = [port.any_name for port in compiled.outputs]
        self._request: Any = compiled.create_infer_request()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        assert self._request is not None, "the engine is closed"
        # Inputs are read in place; outputs are copied, as the request reuses its buffers.
        results = self._request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        return {name: results[index] for index, name in enumerate(self._outputs)}

    def close(self) -> None:
        self._request = None


def _fixed_shapes(manifest: Manifest) -> dict[str, list[int]]:
    """Shapes by input, -1 for an axis that stays symbolic."""
    sizes = manifest.fixed
    return {
        spec.name: [axis if isinstance(axis, int) else sizes.get(axis, -1) for axis in spec.shape]
        for spec in manifest.inputs
    }


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
