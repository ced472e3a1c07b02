"""A TensorRT and a CUDA runtime that know no GPU and forgive nothing.

"Device" memory is host memory that this module owns.  Work is queued on a stream and done when that is
synchronised, so that a result which is read too early is wrong.  The engine computes ``y = 2 x`` and
``s = sum of x over the last axis``.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np

PLAN = b"a plan of the right kind"


class Cuda(types.ModuleType):
    """``cuda.bindings.runtime``: every function returns a status and its values."""

    class cudaMemcpyKind(IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.buffers: dict[int, Any] = {}  # address -> memory that is not freed
        self.streams: dict[int, list[Callable[[], Any]]] = {}
        self.room = 1 << 20

    def cudaStreamCreate(self) -> tuple[int, int]:
        stream = len(self.streams) + 7
        self.streams[stream] = []
        return 0, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        assert not self.streams.pop(stream), "destroyed with work under way"
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        assert size > 0
        if size > self.room:
            return 2, None
        memory = (ctypes.c_char * size)()
        self.buffers[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.buffers[address]  # twice is a KeyError
        return (0,)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: Any, stream: int
    ) -> tuple[int]:
        device = to if kind is self.cudaMemcpyKind.cudaMemcpyHostToDevice else source
        assert len(self.buffers[device]) >= size
        self.streams[stream].append(lambda: ctypes.memmove(to, source, size))
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        for work in self.streams[stream]:
            work()
        self.streams[stream].clear()
        return (0,)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"out of memory"


class TensorIOMode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class ILogger:
    class Severity(IntEnum):
        ERROR = 1

    def __init__(self) -> None:
        pass


class TensorRt(types.ModuleType):
    """The part of ``tensorrt`` that running needs; ``cuda`` is where its work is queued."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__("tensorrt")
        self.TensorIOMode, self.ILogger, self.nptype = TensorIOMode, ILogger, np.dtype
        self.alive: list[str] = []
        self.Runtime = lambda log: Runtime(self, cuda, log)


class Counted:
    """Notes that it lives, so that a test can see in which order things go."""

    def __init__(self, trt: TensorRt) -> None:
        self.trt = trt
        trt.alive.append(type(self).__name__)

    def __del__(self) -> None:
        self.trt.alive.remove(type(self).__name__)


class Runtime(Counted):
    def __init__(self, trt: TensorRt, cuda: Cuda, log: Any) -> None:
        super().__init__(trt)
        self.cuda, self.log = cuda, log

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if plan == PLAN:
            return Engine(self)
        self.log.log(ILogger.Severity.ERROR, "Error Code 6: the version of the plan is another")
        return None


class Engine(Counted):
    names = ("x", "y", "s")
    num_io_tensors = len(names)

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime.trt)
        self.runtime = runtime

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return "float32"

    def create_execution_context(self) -> Context:
        return Context(self)


class Context(Counted):
    """Takes batches up to 4 of width 3."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.trt)
        self.engine, self.cuda = engine, engine.runtime.cuda
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "x"
        if len(shape) != 2 or shape[0] > 4 or shape[1] != 3:
            self.engine.runtime.log.log(ILogger.Severity.ERROR, "Error Code 3: not in the profile")
            return False
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.shape is not None, "asked before the shapes of all inputs are set"
        return self.shape if name != "s" else self.shape[:1]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in Engine.names
        assert address in self.cuda.buffers
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.shape is not None
        assert set(self.addresses) == set(Engine.names), "a tensor has no address"
        rows, width = self.shape
        places = {name: self.cuda.buffers[self.addresses[name]] for name in Engine.names}
        sizes = {"x": rows * width, "y": rows * width, "s": rows}
        assert all(len(places[name]) >= 4 * size for name, size in sizes.items()), "too small"

        def work() -> None:
            value = {n: np.frombuffer(places[n], np.float32, count=sizes[n]) for n in sizes}
            value["y"][:] = 2 * value["x"]
            value["s"][:] = value["x"].reshape(rows, width).sum(axis=1)

        self.cuda.streams[stream].append(work)
        return True
