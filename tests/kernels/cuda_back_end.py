"""Runs one operator by its CUDA kernels: emulated on the CPU, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from tests.kernels import emulated
from thresher.kernels.cuda_library import CUDA, Call, Kernels, Tensor
from thresher.kernels.native import KernelError, Library
from thresher.kernels.registry import OPERATORS

Array = NDArray[Any]
GUARD = 16  # bytes on both sides of a workspace that no kernel writes


def emulates() -> bool:
    """Whether there is no device, or the tests are not for one."""

    return os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()


@cache
def kernels() -> Kernels:
    """The library, emulated or built by nvcc; skips the test where it cannot be."""
    if emulates():
        return emulated.kernels()
    library = Library((), CUDA)
    try:
        return Kernels(library.find() or library.build())
    except KernelError as error:
        pytest.skip(str(error))


def run(
    name: str, arguments: dict[str, Array], extra: tuple[str, ...] = (), **attributes: Any
) -> list[Array]:
    """All outputs of one operator; ``extra`` are flags of the emulated library.

    Raises:
        KernelError: the kernels do not take the call.
    """
    if emulates():
        return emulated.run(name, arguments, extra, **attributes)
    inputs = [
        torch.from_numpy(arguments[one].copy()).cuda() for one in emulated.tensor_inputs(name)
    ]
    numbers = {**emulated.counts(name, arguments), **attributes}
    found: list[list[torch.Tensor]] = []
    for _ in range(2):
        filled = emulated.results(name, arguments).values()
        outputs = [torch.from_numpy(one).cuda() for one in filled]
        launch(name, inputs, outputs, numbers)
        found.append(outputs)
    for one, other in zip(*found, strict=True):
        bits = (side.flatten().view(torch.uint8) for side in (one, other))
        assert not one.numel() or torch.equal(*bits)
    return [one.cpu().numpy() for one in found[0]]


def launch(
    name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], numbers: dict[str, Any]
) -> None:
    """One call, with a workspace that is guarded on both sides."""
    call, room = prepared(name, inputs, outputs, numbers)
    call()
    assert bool((room[:GUARD] == 0xA5).all())
    assert bool((room[-GUARD:] == 0xA5).all())


def prepared(
    name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], numbers: dict[str, Any]
) -> tuple[Callable[[], None], torch.Tensor]:
    """A call on the stream that is current when it is made, and its workspace; the call keeps all it needs."""
    operator = OPERATORS[name]
    made = Call.of([_tensor(one) for one in inputs], [_tensor(one) for one in outputs], numbers)
    size = kernels().workspace(operator, made)
    room = torch.full((size + 2 * GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
    made.workspace, made.workspace_bytes = room.data_ptr() + GUARD, size

    def call(*_: object) -> None:
        made.stream = torch.cuda.current_stream().cuda_stream
        kernels().launch(operator, made)

    return partial(call, room, *inputs, *outputs), room


def _tensor(tensor: torch.Tensor) -> Tensor:
    assert tensor.is_contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Tensor.of(tensor.data_ptr(), dtype, tensor.shape)
