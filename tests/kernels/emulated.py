"""Runs the CUDA kernels on the CPU: their sources, compiled with ``cuda_emulator``.

Every call runs twice, with the threads and blocks in rising and in falling order, and has to give the
same bits, since nothing that a kernel computes may hang on that order.
"""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from thresher.kernels.cuda_library import CUDA, Call, Kernels, Tensor
from thresher.kernels.native import CPU, Library
from thresher.kernels.registry import OPERATORS

Array = NDArray[Any]
EMULATOR = Path(__file__).parent / "cuda_emulator"
EMULATED = replace(
    CUDA,
    processor="emulated",
    headers=(*CUDA.headers, "../tests/kernels/cuda_emulator/*.h"),
    compilers=("g++", "clang++"),
    variable="CXX",
    needs=CPU.needs,
    flags=(
        "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra",
        f"-I{EMULATOR}", "-xc++",
    ),
)  # fmt: skip


@cache
def kernels(extra: tuple[str, ...] = ()) -> Kernels:
    """The emulated library; skips the test where there is no compiler."""
    compiler = next(filter(shutil.which, EMULATED.compilers), None)
    if compiler is None:
        pytest.skip(f"{EMULATED.needs} is not installed")
    library = Library(extra, EMULATED)
    return Kernels(library.find() or library.build(compiler))


def call(
    name: str, arguments: dict[str, Array], outputs: dict[str, Array], **attributes: Any
) -> Call:
    """A call on arrays in ordinary memory; inputs in the order of the operator."""
    inputs = [_tensor(arguments[one]) for one in tensor_inputs(name)]
    return Call.of(
        inputs,
        [_tensor(one) for one in outputs.values()],
        {**counts(name, arguments), **attributes},
    )


def tensor_inputs(name: str) -> list[str]:
    """The inputs that are no counts."""
    operator = OPERATORS[name]
    return [one for one in operator.inputs if one not in operator.counts]


def counts(name: str, arguments: dict[str, Array]) -> dict[str, int]:
    """The others."""
    return {one: int(arguments[one]) for one in OPERATORS[name].counts}


def results(name: str, arguments: dict[str, Array]) -> dict[str, Array]:
    """Arrays for all outputs, filled with what no kernel writes."""
    operator = OPERATORS[name]
    counts = {one: max(int(arguments[one]), 0) for one in operator.counts}
    shapes = operator.output_shapes({n: v.shape for n, v in arguments.items()}, counts)
    tokens = next(arguments[n].dtype for n, kind in operator.inputs.items() if kind == "T")
    types: dict[str, Any] = {"T": tokens, "tensor(float)": np.float32, "tensor(int64)": np.int64}
    return {one: np.full(shape, 77, types[operator.outputs[one]]) for one, shape in shapes.items()}


def run(
    name: str, arguments: dict[str, Array], extra: tuple[str, ...] = (), **attributes: Any
) -> list[Array]:
    """All outputs of one operator.

    Raises:
        KernelError: the kernels do not take the call.
    """
    library, operator = kernels(extra), OPERATORS[name]
    arguments = {one: np.array(value, order="C") for one, value in arguments.items()}
    found: list[list[Array]] = []
    for falling in (0, 1):
        library._library.thresher_emulator_falling(falling)
        outputs = results(name, arguments)
        made = call(name, arguments, outputs, **attributes)
        workspace = np.full(library.workspace(operator, made) + 16, 0xA5, np.uint8)
        start = -workspace.ctypes.data % 16
        made.workspace = workspace.ctypes.data + start
        made.workspace_bytes = len(workspace) - 16
        library.launch(operator, made)
        assert (workspace[start + made.workspace_bytes :] == 0xA5).all()
        assert (workspace[:start] == 0xA5).all()
        found.append(list(outputs.values()))
    for one, other in zip(*found, strict=True):
        assert_array_equal(one.view(np.uint8), other.view(np.uint8))
    return found[0]


def _tensor(array: Array) -> Tensor:
    assert array.flags.c_contiguous
    return Tensor.of(array.ctypes.data_as(ctypes.c_void_p).value, str(array.dtype), array.shape)
