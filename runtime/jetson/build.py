"""Build ``engine.plan`` from ``model.onnx`` on the Jetson that will run it: ``python3 build.py``.

Needs what JetPack brings (Python 3.10 or later, TensorRT 10 with its Python bindings), and for ``--plugins``
CMake and nvcc.  ``lock.json`` says for which GPU, sizes and TensorRT, and holds a checksum of every file.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOCK, MODEL, PLAN, RECORD, TIMINGS = (
    "lock.json",
    "model.onnx",
    "engine.plan",
    "engine.json",
    "timing.cache",
)
SOURCES, LIBRARIES = "kernels/tensorrt", "build"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


class Trouble(Exception):
    """One sentence for the user."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the engine of this folder on this Jetson.")
    parser.add_argument(
        "--plugins", action="store_true", help="compile the plugins first, and build with them"
    )
    parser.add_argument(
        "--any-gpu", action="store_true", help="build although the GPU is not the one of lock.json"
    )
    parser.add_argument("--workspace", type=int, metavar="MB", help="most memory for scratch")
    options = parser.parse_args()
    try:
        made = build(HERE, options.plugins, options.any_gpu, options.workspace)
    except Trouble as trouble:
        print(f"build.py: {trouble}", file=sys.stderr)
        return 2
    print(json.dumps(made, indent=2))
    return 0


def build(folder: Path, plugins: bool, any_gpu: bool, workspace: int | None) -> dict[str, Any]:
    """Check the folder and the machine, build, and write the engine and what it was built with."""
    lock = json.loads((folder / LOCK).read_text())
    check_files(folder, lock["files"])
    trt = tensorrt(lock["tensorrt"])
    found = capability()
    if found != lock["capability"] and not any_gpu:
        raise Trouble(
            f"this GPU has compute capability {found} and the folder is for {lock['target']}"
            f" ({lock['capability']}): export for this one, or give --any-gpu"
        )
    libraries = compiled(folder, found) if plugins else []
    for library in libraries:
        trt.get_plugin_registry().load_library(str(folder / library))
    plan = serialized(trt, folder, lock["profile"], workspace)
    written(folder / PLAN, plan)
    made = {
        "tensorrt": trt.__version__,
        "capability": found,
        "engine": digest(folder / PLAN),
        "lock": digest(folder / LOCK),
        "plugins": {library: digest(folder / library) for library in libraries},
    }
    written(folder / RECORD, (json.dumps(made, indent=2) + "\n").encode())
    return made


def serialized(trt: Any, folder: Path, profile: dict[str, Any], workspace: int | None) -> Any:
    """Parse and build; the types of the network are those of the file."""
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(folder / MODEL)):
        raise Trouble(f"TensorRT does not take {MODEL}: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    if profile:
        sizes = builder.create_optimization_profile()
        for name, (least, usual, most) in profile.items():
            sizes.set_shape(name, tuple(least), tuple(usual), tuple(most))
        config.add_optimization_profile(sizes)
    kept = folder / TIMINGS
    for content in (kept.read_bytes() if kept.is_file() else b"", b""):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, False):
            break  # else it is another machine's, or damaged
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Trouble("TensorRT cannot build the engine: its log above says why")
    written(kept, config.get_timing_cache().serialize())
    return plan


def compiled(folder: Path, capability: str) -> list[str]:
    """Compile the plugins for one GPU; returns their libraries, relative to the folder."""
    place = folder / LIBRARIES
    architecture = f"-DCMAKE_CUDA_ARCHITECTURES={capability.replace('.', '')}"
    commands = (
        [
            "cmake",
            "-S",
            str(folder / SOURCES),
            "-B",
            str(place),
            architecture,
            "-DCMAKE_BUILD_TYPE=Release",
        ],
        ["cmake", "--build", str(place), "--parallel"],
    )
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise Trouble(
                f"{command[0]} cannot be run ({error.strerror}): apt install cmake"
            ) from error
        if done.returncode:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            first = next((at for at, line in enumerate(said) if "rror" in line), 0)
            reason = (
                " ".join(said[first : first + 2]) or "no reason told"
            )  # CMake's is on the second
            raise Trouble(f"the plugins cannot be compiled: {reason}")
    found = sorted(str(file.relative_to(folder)) for file in place.rglob("*.so"))
    if not found:
        raise Trouble(f"CMake made no library in {place}")
    return found


def tensorrt(wanted: str) -> Any:
    """The package, if its major version is the wanted one."""
    try:
        import tensorrt as trt
    except ImportError as error:
        raise Trouble(
            f"TensorRT's Python bindings are missing ({error}): apt install python3-libnvinfer"
        ) from error
    if trt.__version__.split(".")[0] != wanted:
        raise Trouble(
            f"TensorRT {wanted} is needed and {trt.__version__} installed: choose another JetPack"
        )
    return trt


def capability() -> str:
    """Compute capability of the first GPU, such as "8.7"."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Trouble(f"there is no NVIDIA driver ({error})") from error
    device, parts = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    for part, attribute in zip(parts, (CAPABILITY_MAJOR, CAPABILITY_MINOR), strict=True):
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
    if failed:
        raise Trouble(f"the NVIDIA driver answers with error {failed}")
    return ".".join(str(part.value) for part in parts)


def check_files(folder: Path, wanted: dict[str, str]) -> None:
    """Compare every file with its checksum."""
    for name, expected in wanted.items():
        file = folder / name
        if not file.is_file():
            raise Trouble(f"{name} is missing: copy the folder again")
        if digest(file) != expected:
            raise Trouble(f"{name} is not the file that was exported: copy the folder again")


def digest(file: Path) -> str:
    """sha256, as hex."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def written(file: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, file)


if __name__ == "__main__":
    sys.exit(main())
