"""What the back ends of ONNX Runtime share: one class of them for each execution provider.

They run ``model.onnx`` as it is.  ONNX Runtime only logs a provider that does not load, and goes on
with the CPU; here that is an error with the loader's own reason.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from thresher.compiler.errors import MissingRequirementError, RefusedError
from thresher.kernels.native import SWITCH
from thresher.runtime.backends.base import Array, Availability, Backend, Feeds
from thresher.runtime.manifest import MODEL

if TYPE_CHECKING:
    import onnx
    import onnxruntime

CPU = "CPUExecutionProvider"
# First release that reads an ONNX opset or IR version (ONNX Runtime's compatibility table).
FIRST_FOR_OPSET = {19: "1.16", 20: "1.17", 21: "1.20", 22: "1.20", 23: "1.23"}
FIRST_FOR_IR = {9: "1.16", 10: "1.18", 11: "1.22", 12: "1.23"}
OLDEST = "1.15"
BUILT_IN = {CPU, "AzureExecutionProvider"}  # providers that live in no library of their own
LIBRARIES = {"CUDAExecutionProvider": "libonnxruntime_providers_cuda.so"}
BRIDGE = "libonnxruntime_providers_shared.so"  # which they all are loaded through
DEVICE = re.compile(r"(CUDA|CUDNN|CUBLAS) (failure|error)|EP_FAIL|wasn't able to be loaded", re.I)
WARNING, FATAL = 2, 4  # severities of ONNX Runtime's log; the first is its default


class OnnxRuntime(Backend):
    """ONNX Runtime with one execution provider."""

    package = "onnxruntime"
    prefix = MODEL
    provider: ClassVar[str]

    def available(self) -> Availability:
        state = super().available()
        if not state.ok:
            return state
        import onnxruntime as ort

        # A flavour such as onnxruntime-gpu is installed under its own name: ask the module.
        return Availability(True, str(ort.__version__))

    def can_take(self, node: onnx.NodeProto, opset: int) -> str | None:
        """Kernels of the CPU decide: every session has them beside those of its provider."""
        if node.op_type == "Constant" and not node.domain:
            return None
        schema, table = _schema(node, opset), _kernels()
        if schema is None and not node.domain:
            return f"opset {opset} has no such operator"
        kernels = (table or {}).get((node.domain, node.op_type), [])
        if schema is None:  # an op of ONNX Runtime's own, or of nobody's
            known = kernels or (table is None and node.domain.startswith("com.microsoft"))
            return None if known else "no kernel and no function body of that name"
        since = schema.since_version
        if table is None or _expandable(schema) or any(a <= since <= b for a, b in kernels):
            return None
        return f"onnxruntime {self.available().version} has no CPU kernel for its version {since}"

    def requires(self, model: onnx.ModelProto) -> dict[str, str]:
        opset = max((e.version for e in model.opset_import if not e.domain), default=0)
        wanted = [FIRST_FOR_OPSET.get(opset, OLDEST), FIRST_FOR_IR.get(model.ir_version, OLDEST)]
        newest = max(wanted, key=lambda text: tuple(map(int, text.split("."))))
        return {self.package: f">={newest}"}


class OrtSession:
    """One session of ONNX Runtime."""

    def __init__(self, session: onnxruntime.InferenceSession, details: dict[str, str]) -> None:
        self.session: onnxruntime.InferenceSession | None = session
        self.details = details
        self._outputs = [output.name for output in session.get_outputs()]

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
        kernels: a library of CPU kernels that takes the place of the function bodies; for sessions
            on the CPU only, as it would draw its nodes there from any other provider.

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
    # Without VNNI, sums of two 8-bit products overflow 16 bits unless weights become unsigned.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if kernels is not None:
        try:
            options.register_custom_ops_library(str(kernels))
        except Exception as error:  # the binding raises a dozen unrelated kinds
            raise MissingRequirementError(
                f"the kernels {kernels} cannot be loaded ({_first_line(error)}): run thresher kernels"
                f" build --force, or set {SWITCH}=off"
            ) from error
    return options


def open_session(
    model: Path,
    options: onnxruntime.SessionOptions,
    provider: str = CPU,
    settings: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Open a session on exactly the provider asked for.

    Args:
        model: an ONNX file.
        options: see :func:`session_options`.
        provider: the execution provider.
        settings: of the provider.

    Raises:
        MissingRequirementError: the provider is not there or does not load.
        RefusedError: ONNX Runtime does not take the model.
    """
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        raise MissingRequirementError(
            f"{provider} is not in this onnxruntime {ort.__version__}, which has"
            f" {', '.join(ort.get_available_providers())}: install the flavour that has it"
        )
    try:
        with _quiet(provider):
            session = ort.InferenceSession(
                str(model), options, providers=[(provider, dict(settings or {}))], enable_fallback=0
            )
    except Exception as error:  # the binding raises a dozen unrelated kinds
        if provider != CPU and DEVICE.search(str(error)):
            raise MissingRequirementError(
                f"{provider} cannot be used here ({_first_line(error)}): check the driver and the"
                " CUDA libraries with 'thresher doctor', or export for another target"
            ) from error
        raise RefusedError(
            f"onnxruntime {ort.__version__} refuses {model}: {_first_line(error)}"
        ) from error
    if session.get_providers()[0] != provider:
        raise MissingRequirementError(
            f"{provider} could not be loaded ({loader_reason(provider)}) and onnxruntime fell back to"
            f" {', '.join(session.get_providers())}: install what is missing, or export for another"
            " target"
        )
    return session


def loader_reason(provider: str) -> str:
    """What the system's loader says about a provider's library, which ONNX Runtime only logs."""
    import onnxruntime as ort

    place = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(place / BRIDGE), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(place / LIBRARIES[provider]))
    except OSError as error:
        return str(error)
    return "its library loads, and onnxruntime gives no reason"


@contextmanager
def _quiet(provider: str) -> Iterator[None]:
    """Without the log of a provider that does not load, whose reason we tell ourselves."""
    import onnxruntime as ort

    if provider in BUILT_IN:
        yield
        return
    ort.set_default_logger_severity(FATAL)
    try:
        yield
    finally:
        ort.set_default_logger_severity(WARNING)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


@cache
def _kernels() -> dict[tuple[str, str], list[tuple[int, int]]] | None:
    """(domain, op) to the version ranges that this ONNX Runtime has CPU kernels for.

    None where it cannot be asked: it opens every provider that it was built with, and the process
    ends in a segmentation fault when the library of one (CUDA, TensorRT) does not load.
    """
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if not BUILT_IN.issuperset(ort.get_available_providers()):
        return None
    table: dict[tuple[str, str], list[tuple[int, int]]] = {}
    entries: list[Any] = state.get_all_opkernel_def()
    for entry in entries:
        if entry.provider == CPU:
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
