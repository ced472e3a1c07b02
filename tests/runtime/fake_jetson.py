"""Stand-ins for what JetPack brings, strict about the order of calls.

The engine that this TensorRT "builds" names ``model.onnx``, which ONNX Runtime computes; device memory is host
memory, whose every address is checked.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

TYPED = 1


class Cuda:
    """CUDA's runtime: functions return an error code first."""

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.streams: set[int] = set()
        self.pending: list[tuple[int, int, int]] = []  # copies not yet waited for
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        assert size > 0
        made = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(made)] = made
        return 0, ctypes.addressof(made)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.memory[address]
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:
        self.streams.add(7)
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams.remove(stream)
        return (0,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[int]:
        device, host = (target, source) if kind == 1 else (source, target)
        assert device in self.memory
        assert host not in self.memory
        assert size <= len(self.memory[device])
        assert stream in self.streams
        self.pending.append((target, source, size))
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert stream in self.streams
        for copy in self.pending:
            ctypes.memmove(*copy)
        self.pending.clear()
        return (0,)


class TensorRt:
    """TensorRT's builder and runtime, as far as the two scripts use them."""

    def __init__(self, cuda: Cuda, version: str = "10.3.0") -> None:
        self.__version__ = version
        self.cuda = cuda
        self.libraries: list[str] = []
        self.Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=TYPED)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        self.nptype = onnx.helper.tensor_dtype_to_np_dtype

    def get_plugin_registry(self) -> Any:
        return SimpleNamespace(load_library=self.libraries.append)

    def Builder(self, log: Any) -> Any:
        assert isinstance(log, self.Logger)
        return Builder()

    def OnnxParser(self, network: Network, log: Any) -> Any:
        assert isinstance(network, Network)

        def parse(file: str) -> bool:
            network.file = file
            return Path(file).read_bytes()[:3] != b"bad"

        reason = SimpleNamespace(desc=lambda: "no importer for Odd")
        return SimpleNamespace(parse_from_file=parse, get_error=lambda index: reason)

    def Runtime(self, log: Any) -> Any:
        assert isinstance(log, self.Logger)
        return SimpleNamespace(
            deserialize_cuda_engine=lambda plan: Engine(json.loads(plan), self.cuda)
        )


class Network:
    file = ""


class Builder:
    """A builder that demands a profile for symbolic axes."""

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << TYPED
        return Network()

    def create_optimization_profile(self) -> Any:
        sizes: dict[str, Any] = {}

        def set_shape(name: str, least: Any, usual: Any, most: Any) -> None:
            assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
            sizes[name] = (least, most)

        return SimpleNamespace(set_shape=set_shape, sizes=sizes)

    def create_builder_config(self) -> Any:
        return Config()

    def build_serialized_network(self, network: Network, config: Config) -> memoryview | None:
        assert config.timings is not None
        model = onnx.load(network.file)
        inputs = {i.name: i.type.tensor_type.shape.dim for i in model.graph.input}
        symbolic = any(d.dim_param for dims in inputs.values() for d in dims)
        if symbolic and set(config.sizes) != set(inputs):
            return None
        told = json.dumps({"file": network.file, "sizes": config.sizes})
        return memoryview(told.encode())


class Config:
    """A builder's settings."""

    def __init__(self) -> None:
        self.sizes: dict[str, Any] = {}
        self.timings: Any = None

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        assert (pool, size) == ("workspace", 64 << 20)

    def add_optimization_profile(self, profile: Any) -> int:
        self.sizes = profile.sizes
        return 0

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(content=content, serialize=lambda: content + b"t")

    def set_timing_cache(self, timings: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if timings.content.startswith(b"another machine"):
            return False
        self.timings = timings
        return True

    def get_timing_cache(self) -> Any:
        return self.timings


class Engine:
    """A loaded engine with one context."""

    def __init__(self, told: dict[str, Any], cuda: Cuda) -> None:
        self.session = ort.InferenceSession(told["file"])
        self.sizes, self.cuda = told["sizes"], cuda
        graph = onnx.load(told["file"]).graph
        self.io = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
        self.inputs = [v.name for v in graph.input]
        self.num_io_tensors = len(self.io)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.io)[index])

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name: str) -> int:
        return int(self.io[name])

    def create_execution_context(self) -> Engine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, most = self.sizes[name]
        fits = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = shape
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert set(self.shapes) >= set(self.inputs), "shapes of outputs follow from those of inputs"
        feeds = {n: np.zeros(self.shapes[n], np.float32) for n in self.inputs}
        shape = self.session.run([name], feeds)[0].shape
        self.shapes[name] = shape
        return tuple(shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.cuda.memory
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream in self.cuda.streams
        assert not self.cuda.pending, "inputs have to be there"
        assert set(self.addresses) == set(self.io), "every tensor has to have an address"
        feeds = {name: self.view(name) for name in self.inputs}
        outputs = [name for name in self.io if name not in self.inputs]
        for name, value in zip(outputs, self.session.run(outputs, feeds), strict=True):
            self.view(name)[...] = value
        return True

    def view(self, name: str) -> Any:
        memory = self.cuda.memory[self.addresses[name]]
        return np.frombuffer(memoryview(memory).cast("B"), np.float32).reshape(self.shapes[name])


class Device:
    """A Jetson on which the scripts of a folder are run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        self.cuda = Cuda()
        self.install("10.3.0")
        runtime: Any = ModuleType("cuda.bindings")
        runtime.runtime = self.cuda
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", runtime)

    def install(self, version: str) -> None:
        self.trt = TensorRt(self.cuda, version)
        self.patch.setitem(sys.modules, "tensorrt", self.trt)

    def script(self, name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"device_{name[:-3]}", self.folder / name)
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if name == "build.py":
            module.capability = lambda: "8.7"
        return module

    def main(self, name: str, *arguments: object) -> int:
        self.patch.setattr(sys, "argv", [name, *map(str, arguments)])
        return int(self.script(name).main())
