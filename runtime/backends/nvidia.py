"""The NVIDIA GPU of this machine, as its driver tells: no package is needed to ask."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """The GPU that CUDA numbers 0; ``capability`` is its compute capability, such as ``"sm89"``,
    ``driver`` the release of CUDA that its driver is for, such as ``"13.0"``."""

    name: str
    capability: str
    driver: str


@cache
def no_gpu() -> str:
    """Why no NVIDIA GPU can be used here, or nothing."""
    found = _ask()
    return found if isinstance(found, str) else ""


@cache
def gpu() -> Gpu | None:
    """The GPU that engines run on, or None without one."""
    found = _ask()
    return found if isinstance(found, Gpu) else None


def free_memory() -> int | None:
    """Bytes of the GPU that nobody uses, where the package ``cuda-bindings`` is there to ask."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    status, free, _ = runtime.cudaMemGetInfo()
    return None if int(status) else int(free)


def _ask() -> Gpu | str:
    """The GPU, or why there is none.  ``cuInit`` and so on: CUDA driver API."""
    try:
        driver: Any = ctypes.CDLL(DRIVER)
    except OSError as error:
        return f"no NVIDIA driver ({error})"
    count = ctypes.c_int()
    if status := driver.cuInit(0):
        return f"the NVIDIA driver does not start (CUDA error {status})"
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver sees no GPU"
    name = ctypes.create_string_buffer(256)
    major, minor, release = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetName(name, len(name), 0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, 0)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, 0)
    driver.cuDriverGetVersion(ctypes.byref(release))
    return Gpu(
        name.value.decode(),
        f"sm{major.value}{minor.value}",
        f"{release.value // 1000}.{release.value % 1000 // 10}",
    )
