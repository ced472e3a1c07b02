"""Run ``engine.plan`` on arrays and time it: ``python3 run.py --input x=photo.npy --save out.npz``.

Needs numpy, TensorRT's Python bindings and cuda-python, and no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PLAN, RECORD = "engine.plan", "engine.json"


class Trouble(Exception):
    """One sentence for the user."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the engine of this folder on arrays.")
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="NAME=FILE.npy|FILE.npz",
        help="arrays, by name; may be repeated",
    )
    parser.add_argument("--save", type=Path, metavar="FILE.npz", help="write the outputs as arrays")
    parser.add_argument(
        "--rounds", type=int, default=50, help="timed runs; 0 for none (default 50)"
    )
    parser.add_argument("--warmup", type=int, default=10, help="runs before these (default 10)")
    options = parser.parse_args()
    try:
        told = run(HERE, arrays(options.input), options.save, options.warmup, options.rounds)
    except Trouble as trouble:
        print(f"run.py: {trouble}", file=sys.stderr)
        return 2
    print(json.dumps(told, indent=2))
    return 0


def run(
    folder: Path, feeds: dict[str, Any], save: Path | None, warmup: int, rounds: int
) -> dict[str, Any]:
    """Outputs in short, and milliseconds of a run without copies: launch to the end of the stream."""
    engine = loaded(folder)
    session = Session(engine, feeds)
    try:
        session.run()
        outputs = session.outputs()
        for _ in range(warmup if rounds else 0):
            session.run()
        times = [session.run() for _ in range(rounds)]
    finally:
        session.close()
    if save is not None:
        np.savez(save, **outputs)
    told: dict[str, Any] = {
        "outputs": {
            name: {
                "dtype": str(value.dtype),
                "shape": list(value.shape),
                **(
                    {"lowest": float(value.min()), "highest": float(value.max())}
                    if value.size
                    else {}
                ),
            }
            for name, value in outputs.items()
        }
    }
    if times:
        told["milliseconds"] = {
            "median": statistics.median(times),
            "lowest": min(times),
            "highest": max(times),
            "rounds": rounds,
        }
    return told


def loaded(folder: Path) -> Any:
    """The engine, after its checksum, TensorRT's version and the plugins."""
    try:
        import tensorrt as trt
    except ImportError as error:
        raise Trouble(
            f"TensorRT's Python bindings are missing ({error}): apt install python3-libnvinfer"
        ) from error
    if not (folder / RECORD).is_file():
        raise Trouble("there is no engine yet: run build.py first")
    record = json.loads((folder / RECORD).read_text())
    if trt.__version__ != record["tensorrt"]:
        raise Trouble(
            f"the engine was built with TensorRT {record['tensorrt']} and {trt.__version__} is installed:"
            " run build.py again"
        )
    for name, wanted in {PLAN: record["engine"], **record["plugins"]}.items():
        if not (folder / name).is_file() or digest(folder / name) != wanted:
            raise Trouble(f"{name} is not what was built: run build.py again")
    for library in record["plugins"]:
        trt.get_plugin_registry().load_library(str(folder / library))
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine((folder / PLAN).read_bytes())
    if engine is None:
        raise Trouble("TensorRT cannot load the engine: its log above says why")
    return engine


class Session:
    """An engine with its inputs on the device and room for its outputs."""

    def __init__(self, engine: Any, feeds: dict[str, Any]) -> None:
        import tensorrt as trt

        self._cuda = Cuda()
        self._context = engine.create_execution_context()
        self._device: dict[str, int] = {}
        self._host: dict[str, Any] = {}
        self._results: list[str] = []
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        if set(inputs) != set(feeds):
            raise Trouble(f"the engine takes {', '.join(inputs)} and {', '.join(feeds)} was given")
        self._stream = self._cuda("StreamCreate")
        try:
            for name in inputs:
                value = checked(
                    name, feeds[name], np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
                )
                if not self._context.set_input_shape(name, value.shape):
                    raise Trouble(
                        f"the engine was not built for {name} of shape {list(value.shape)}"
                    )
                self._place(name, value)
                kind = self._cuda.kind("HostToDevice")
                self._cuda(
                    "MemcpyAsync",
                    self._device[name],
                    value.ctypes.data,
                    value.nbytes,
                    kind,
                    self._stream,
                )
            self._results = [name for name in names if name not in feeds]
            for name in self._results:
                shape = tuple(self._context.get_tensor_shape(name))
                self._place(name, np.empty(shape, trt.nptype(engine.get_tensor_dtype(name))))
            self._cuda("StreamSynchronize", self._stream)
        except BaseException:
            self.close()
            raise

    def run(self) -> float:
        """One run; returns its milliseconds."""
        start = time.perf_counter()
        if not self._context.execute_async_v3(int(self._stream)):
            raise Trouble("TensorRT could not run the engine: its log above says why")
        self._cuda("StreamSynchronize", self._stream)
        return 1000 * (time.perf_counter() - start)

    def outputs(self) -> dict[str, Any]:
        """What the last run computed."""
        kind = self._cuda.kind("DeviceToHost")
        for name in self._results:
            value = self._host[name]
            self._cuda(
                "MemcpyAsync",
                value.ctypes.data,
                self._device[name],
                value.nbytes,
                kind,
                self._stream,
            )
        self._cuda("StreamSynchronize", self._stream)
        return {name: self._host[name] for name in self._results}

    def close(self) -> None:
        """Free what was taken on the device."""
        for address in self._device.values():
            self._cuda("Free", address)
        self._device = {}
        self._cuda("StreamDestroy", self._stream)

    def _place(self, name: str, value: Any) -> None:
        self._host[name] = value  # kept alive until copies have ended
        self._device[name] = self._cuda("Malloc", max(value.nbytes, 1))
        self._context.set_tensor_address(name, self._device[name])


class Cuda:
    """Calls of CUDA's runtime by name, with their errors raised; made of either layout of cuda-python."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            try:
                from cuda import cudart as runtime
            except ImportError as error:
                raise Trouble(
                    f"cuda-python is missing ({error}): pip install cuda-python"
                ) from error
        self._runtime: Any = runtime

    def __call__(self, name: str, *arguments: Any) -> Any:
        error, *found = getattr(self._runtime, f"cuda{name}")(*arguments)
        if int(error):
            raise Trouble(f"cuda{name} answers with {error}")
        return found[0] if found else None

    def kind(self, name: str) -> Any:
        return getattr(self._runtime.cudaMemcpyKind, f"cudaMemcpy{name}")


def arrays(given: list[str]) -> dict[str, Any]:
    """Arrays of ``NAME=FILE.npy`` and ``FILE.npz``."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, file = text.partition("=")
        try:
            if equals:
                found[name] = np.load(file, allow_pickle=False)
            else:
                found.update(np.load(text, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise Trouble(f"--input {text}: write NAME=FILE.npy or FILE.npz ({error})") from error
    return found


def checked(name: str, value: Any, wanted: Any) -> Any:
    """The array in the type and layout that the engine wants; only floats are cast, and only to floats."""
    if value.dtype != wanted and not value.dtype.kind == wanted.kind == "f":
        raise Trouble(f"{name} is {value.dtype} and the engine takes {wanted}: convert it first")
    return np.ascontiguousarray(value, wanted)


def digest(file: Path) -> str:
    """sha256, as hex."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
