"""Which implementation an operator runs on a CUDA device: its Triton kernels, else its reference.

The kernels are imported at the first call on a device; importing this module imports no Triton.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thresher.kernels.native import SWITCH
from thresher.kernels.registry import BY_TORCH_NAME

Function = Callable[..., Any]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def on_gpu(reference: Function) -> Function:
    """What an operator does with CUDA tensors.

    The reference runs where there are no kernels or no Triton, where ``THRESHER_KERNELS=off``,
    and for element types that the kernels do not compute in (double and complex numbers).
    """

    @functools.wraps(reference)
    def run(*inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        kernel = None if os.environ.get(SWITCH) == "off" else kernels(reference.__name__)
        if kernel is None or not all(map(_fits, tensors)):
            return reference(*inputs)
        with torch.cuda.device(tensors[0].get_device()):  # -1, on the CPU, changes nothing
            return kernel(*inputs)

    return run


@functools.cache
def kernels(operator: str) -> Function | None:
    """The Triton implementation of an operator by its torch name; None where there is none."""
    if not BY_TORCH_NAME[operator].triton:
        return None
    try:
        importlib.import_module("triton")
    except ImportError:
        return None
    module = importlib.import_module(f"thresher.kernels.{operator}.gpu")
    found: Function = getattr(module, operator)
    return found


def _fits(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return tensor.dtype in FLOATS
    return not tensor.is_complex()
