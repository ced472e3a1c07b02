"""ONNX Runtime on the CPU: the default target.  Runs ``model.onnx`` as it is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import MissingRequirementError, RefusedError
from thresher.kernels.native import SWITCH, KernelError, wanted
from thresher.runtime.backends.base import Array, Availability, Backend, Feeds
from thresher.runtime.manifest import MODEL, Manifest

if TYPE_CHECKING:
    import onnx
    import onnxruntime

PROVIDER = "CPUExecutionProvider"
# First release that reads an ONNX opset or IR version (ONNX Runtime's compatibility table).
FIRST_FOR_OPSET = {19: "1.16", 20: "1.17", 21: "1.20", 22: "1.20", 23: "1.23"}
FIRST_FOR_IR = {9: "1.16", 10: "1.18", 11: "1.22", 12: "1.23"}
OLDEST = "1.15"


class OnnxRuntime(Backend):
    """ONNX Runtime with the CPU provider."""

    target = "cpu"
    summary = "ONNX Runtime on the CPU"
    package = "onnxruntime"
    install = "pip install onnxruntime"
    prefix = MODEL
    precisions = ("fp32", "fp16", "int8")

    def available(self) -> Availability:
        state = super().available()
        if not state.ok:
            return state
        import onnxruntime as ort

        found = ort.get_available_providers()
        if PROVIDER not in found:
            reason = f"this onnxruntime has only the providers {', '.join(found)}"
            return Availability(False, state.version, reason, self.install)
        # A flavour such as onnxruntime-gpu is installed under its own name: ask the module.
        return Availability(True, str(ort.__version__))

    def can_take(self, node: onnx.NodeProto, opset: int) -> str | None:
        if node.op_type == "Constant" and not node.domain:
            return None
        kernels = _kernels().get((node.domain, node.op_type), [])
        schema = _schema(node, opset)
        if schema is None and not node.domain:
            return f"opset {opset} has no such operator"
        if schema is None:  # an op of ONNX Runtime's own, or of nobody's
            return None if kernels else "no kernel and no function body of that name"
        since = schema.since_version
        if _expandable(schema) or any(low <= since <= high for low, high in kernels):
            return None
        return f"onnxruntime {self.available().version} has no CPU kernel for its version {since}"

    def requires(self, model: onnx.ModelProto) -> dict[str, str]:
        opset = max((e.version for e in model.opset_import if not e.domain), default=0)
        wanted = [FIRST_FOR_OPSET.get(opset, OLDEST), FIRST_FOR_IR.get(model.ir_version, OLDEST)]
        newest = max(wanted, key=lambda text: tuple(map(int, text.split("."))))
        return {"onnxruntime": f">={newest}"}

    def open(self, folder: Path, manifest: Manifest, threads: int) -> CpuSession:
        kernels = kernel_library()
        details = {
            "provider": PROVIDER,
            "threads": str(threads),
            "kernels": "native" if kernels else "function bodies",
        }
        return CpuSession(folder / MODEL, session_options(threads, kernels), details)


class CpuSession:
    """One ONNX Runtime session."""

    def __init__(
        self, model: Path, options: onnxruntime.SessionOptions, details: dict[str, str]
    ) -> None:
        self.session: onnxruntime.InferenceSession | None = open_session(model, options)
        self.details = details
        self._outputs = [output.name for output in self.session.get_outputs()]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        assert self.session is not None, "the engine is closed"
        values = self.session.run(self._outputs, dict(feeds))
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        self.session = None


def session_options(threads: int, kernels: Path | None = None) -> onnxruntime.SessionOptions:
    """Options that hold for every session of ours.

    Args:
        threads: of one operator.
        kernels: a library that takes the place of the function bodies; see :func:`kernel_library`.

    Raises:
        MissingRequirementError: the library cannot be loaded.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle workers must not spin while another candidate of an interleaved measurement runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if kernels is not None:
        try:
            options.register_custom_ops_library(str(kernels))
        except Exception as error:  # the binding raises a dozen unrelated kinds
            raise MissingRequirementError(
                f"the kernels {kernels} cannot be loaded ({_first_line(error)}): run thresher kernels"
                f" build --force, or set {SWITCH}=off"
            ) from error
    return options


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
    import numpy as np
    import onnx.helper as make
    import onnxruntime as ort

    x, index = np.arange(6.0, dtype=np.float32).reshape(1, 3, 2), np.array([[2, 0]])
    node = make.make_node("GatherTokens", ["x", "index"], ["y"], domain="thresher")
    graph = make.make_graph(
        [node],
        "trial",
        [
            make.make_tensor_value_info("x", 1, x.shape),
            make.make_tensor_value_info("index", 7, index.shape),
        ],
        [make.make_tensor_value_info("y", 1, (1, 2, 2))],
    )
    opsets = [make.make_opsetid("", 20), make.make_opsetid("thresher", 1)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(1, library), providers=[PROVIDER]
    )
    (y,) = session.run(None, {"x": x, "index": index})
    if not np.array_equal(y, x[:, [2, 0]]):
        raise MissingRequirementError(f"the kernels {library} compute something else: rebuild them")


def open_session(
    model: Path, options: onnxruntime.SessionOptions, provider: str = PROVIDER
) -> onnxruntime.InferenceSession:
    """Open a session on exactly the provider asked for.

    Raises:
        MissingRequirementError: the provider is not there (ONNX Runtime would fall back silently).
        RefusedError: ONNX Runtime does not take the model.
    """
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        raise MissingRequirementError(
            f"{provider} is not in this onnxruntime {ort.__version__}, which has"
            f" {', '.join(ort.get_available_providers())}: install the flavour that has it"
        )
    try:
        session = ort.InferenceSession(str(model), options, providers=[provider])
    except Exception as error:  # the binding raises a dozen unrelated kinds
        raise RefusedError(
            f"onnxruntime {ort.__version__} refuses {model}: {_first_line(error)}"
        ) from error
    if session.get_providers()[0] != provider:
        raise MissingRequirementError(
            f"{provider} could not be loaded and onnxruntime fell back to"
            f" {', '.join(session.get_providers())}: see its log above for the missing library"
        )
    return session


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


@cache
def _kernels() -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(domain, op) to the version ranges that this ONNX Runtime has CPU kernels for."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    table: dict[tuple[str, str], list[tuple[int, int]]] = {}
    entries: list[Any] = state.get_all_opkernel_def()
    for entry in entries:
        if entry.provider == PROVIDER:
            table.setdefault((entry.domain, entry.op_name), []).append(entry.version_range)
    return table


def _schema(node: onnx.NodeProto, opset: int) -> onnx.defs.OpSchema | None:
    """The op's definition in force at ``opset``, or None for an op that ONNX lacks."""
    import onnx

    try:
        return onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None


def _expandable(schema: onnx.defs.OpSchema) -> bool:
    """Whether ONNX defines the op by simpler ones, which ONNX Runtime then runs instead."""
    names = ("has_function", "has_context_dependent_function")
    return any(getattr(schema, name) for name in names)
