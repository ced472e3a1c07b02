"""The CUDA kernels: how they are built, and how they are called.

The library needs no driver to be loaded; without one a launch is an error.  ``cuda/call.h`` is the
other side of :class:`Call`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thresher.kernels.native import KernelError, Kind
from thresher.kernels.operator import Operator

# A cubin runs on the later GPUs of its major version, the PTX on all from Turing on.
ARCHITECTURES = ("75", "80", "90", "100", "120")
CUDA = Kind(
    processor="cuda",
    sources=("cuda/*.cu", "*/cuda.cu"),
    headers=("cuda/*.h",),
    compilers=("nvcc",),
    variable="NVCC",
    needs="NVIDIA's CUDA toolkit 12.8 or newer",
    flags=(
        "-std=c++17", "-O3", "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "--threads=0",
        *(f"-gencode=arch=compute_{one},code=sm_{one}" for one in ARCHITECTURES),
        f"-gencode=arch=compute_{ARCHITECTURES[0]},code=compute_{ARCHITECTURES[0]}",
    ),
)  # fmt: skip

# Numbers of ONNX's TensorProto.DataType, by numpy's names.
ELEMENTS = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11, "bfloat16": 16,
}  # fmt: skip
_AXES, _TENSORS = 8, 4
_FIELDS = {"protected": "protect"}  # attributes that have another name in C


class Tensor(ctypes.Structure):
    """``ThresherTensor``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("element", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.c_int64 * _AXES),
    ]

    @classmethod
    def of(cls, data: int | None, dtype: str, shape: Sequence[int]) -> Tensor:
        """``data`` is an address on the device."""
        if len(shape) > _AXES:
            raise KernelError(f"a tensor of rank {len(shape)} is more than the kernels take")
        return cls(data, ELEMENTS.get(dtype, 0), len(shape), (ctypes.c_int64 * _AXES)(*shape))


class Call(ctypes.Structure):
    """``ThresherCall``."""

    _fields_ = [
        ("inputs", Tensor * _TENSORS),
        ("outputs", Tensor * _TENSORS),
        ("keep", ctypes.c_int64),
        ("protect", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("margin", ctypes.c_double),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    ]

    @classmethod
    def of(
        cls,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        numbers: Mapping[str, Any],
        stream: int | None = None,
    ) -> Call:
        """``inputs`` are all but ``keep``; ``numbers`` are ``keep`` and the attributes by name."""
        made = cls((Tensor * _TENSORS)(*inputs), (Tensor * _TENSORS)(*outputs), stream=stream)
        for name, number in numbers.items():
            setattr(made, _FIELDS.get(name, name), number)
        return made


class Kernels:
    """A loaded library.

    Raises:
        KernelError: it cannot be loaded.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(file))
            launch, workspace = (
                self._library.thresher_cuda_launch,
                self._library.thresher_cuda_workspace,
            )
            message = self._library.thresher_cuda_message
        except (OSError, AttributeError) as error:
            raise KernelError(f"{file} cannot be loaded ({error})") from error
        launch.argtypes = [ctypes.c_char_p, ctypes.POINTER(Call)]
        workspace.argtypes = [*launch.argtypes, ctypes.POINTER(ctypes.c_int64)]
        message.restype = ctypes.c_char_p
        self._launch, self._workspace, self._message = launch, workspace, message

    def workspace(self, operator: Operator, call: Call) -> int:
        """Bytes of device memory that the call needs, 16-byte aligned; grows with every axis.

        Raises:
            KernelError: shapes or types do not fit.
        """
        size = ctypes.c_int64()
        self._demand(operator, self._workspace(operator.name.encode(), call, ctypes.byref(size)))
        return size.value

    def launch(self, operator: Operator, call: Call) -> None:
        """Queue the operator on the call's stream.

        Raises:
            KernelError: shapes, types or counts do not fit, or the GPU refuses.
        """
        self._demand(operator, self._launch(operator.name.encode(), call))

    def _demand(self, operator: Operator, status: int) -> None:
        if status:
            raise KernelError(f"{operator.name}: {self._message(status).decode()}")
