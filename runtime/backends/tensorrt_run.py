"""Running an engine of TensorRT or TensorRT-RTX."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from thresher.compiler.errors import RefusedError
from thresher.runtime.backends.base import Array, Feeds
from thresher.runtime.backends.cuda_memory import CudaMemory
from thresher.runtime.backends.tensorrt_build import logger


class TensorRtSession:
    """One engine with one execution context, and a buffer on the GPU for each input and output.

    Buffers grow with the largest shape that was run, and stay.
    """

    def __init__(
        self, trt: Any, memory: CudaMemory, plan: Path, title: str, details: dict[str, str]
    ) -> None:
        self.details = details
        self.held = ExitStack()  # what the engine needs for as long as it runs
        self._trt, self._memory, self._title = trt, memory, title
        self._log = logger(trt)
        self._runtime: Any = trt.Runtime(self._log)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        self._context: Any = self._engine and self._engine.create_execution_context()
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> address, bytes
        self._types: dict[str, np.dtype[Any]] = {}
        self._inputs: list[str] = []
        self._outputs: list[str] = []
        if self._context is None:
            self.close()
            raise RefusedError(f"{title} cannot load {plan}: {self._log.reason}")
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            self._types[name] = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            given = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self._inputs if given else self._outputs).append(name)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        assert self._context is not None, "the engine is closed"
        given = {n: np.ascontiguousarray(feeds[n], dtype=self._types[n]) for n in self._inputs}
        for name, array in given.items():
            if not self._context.set_input_shape(name, array.shape):
                raise RefusedError(
                    f"{self._title} takes no {list(array.shape)} for {name}: {self._log.reason}"
                )
            self._memory.upload(self._place(name, array.nbytes), array)
        made: dict[str, Array] = {}
        for name in self._outputs:  # their shapes follow from those of all inputs
            made[name] = np.empty(tuple(self._context.get_tensor_shape(name)), self._types[name])
            self._place(name, made[name].nbytes)
        if not self._context.execute_async_v3(self._memory.stream):
            raise RefusedError(f"{self._title} does not run the engine: {self._log.reason}")
        for name, array in made.items():
            self._memory.download(array, self._buffers[name][0])
        self._memory.synchronise()
        return made

    def close(self) -> None:
        """Free the buffers, then what they belong to, then what it needed; a second call does nothing."""
        if self._runtime is None:
            return
        for address, _ in self._buffers.values():
            self._memory.free(address)
        self._buffers.clear()
        self._context = self._engine = self._runtime = None
        self._memory.close()
        self.held.close()

    def _place(self, name: str, size: int) -> int:
        """The address of a buffer of at least ``size`` bytes that the context knows as ``name``."""
        address, room = self._buffers.pop(name, (0, -1))
        if room < size:
            if address:
                self._memory.free(address)
            address, room = self._memory.allocate(size), size
        self._buffers[name] = address, room
        self._context.set_tensor_address(name, address)
        return address
