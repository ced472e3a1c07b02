"""Memory of the GPU and one stream, through NVIDIA's own bindings (``cuda-bindings``), without torch."""

from __future__ import annotations

import importlib
from typing import Any

from thresher.compiler.errors import MissingRequirementError
from thresher.runtime.backends.base import Array

BINDINGS = "cuda.bindings.runtime"


def no_bindings(extra: str) -> str:
    """Why the GPU's memory cannot be reached from Python, or nothing."""
    try:
        importlib.import_module(BINDINGS)
    except ImportError as error:
        return f"the package cuda-bindings is missing ({error}): pip install 'thresher[{extra}]'"
    return ""


class CudaMemory:
    """Buffers and the stream that fills and reads them.  Addresses are plain integers.

    Copies are queued: host arrays must live, and results hold nothing, until :meth:`synchronise`.
    """

    def __init__(self) -> None:
        self._runtime: Any = importlib.import_module(BINDINGS)
        self._stream: Any = self._call("cudaStreamCreate")

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Address of ``size`` new bytes, of at least one, as TensorRT wants an address for no data too.

        Raises:
            MissingRequirementError: the GPU has no room for them.
        """
        return int(self._call("cudaMalloc", max(1, size)))

    def free(self, address: int) -> None:
        """Give a buffer back."""
        self._call("cudaFree", address)

    def upload(self, address: int, array: Array) -> None:
        """Queue the copy of a contiguous array to the GPU."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: Array, address: int) -> None:
        """Queue the copy of a buffer into a contiguous array."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def synchronise(self) -> None:
        """Wait until everything that was queued is done."""
        self._call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Give the stream back."""
        self._call("cudaStreamDestroy", self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """One call of the runtime: its value, or its error as a sentence."""
        status, *values = getattr(self._runtime, name)(*arguments)
        if int(status):
            _, words = self._runtime.cudaGetErrorString(status)
            raise MissingRequirementError(
                f"the GPU does not do what is asked of it ({name}: {words.decode()}): free its memory,"
                " take a smaller batch, or look at its driver"
            )
        return values[0] if values else None
