"""Runs one operator by its Triton kernels: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from thresher.kernels.gpu.dispatch import kernels
from thresher.kernels.registry import OPERATORS

Array = NDArray[Any]
SWITCHES: dict[str, dict[str, Any]] = {
    "BipartiteMerge": {"by_index": True},
    "RankedBipartiteMerge": {"by_index": False},
    "KeepTokens": {"fuse": False},
    "FuseTokens": {"fuse": True},
    "SparseSwiGLU": {"activation": "silu"},
    "SparseGeGLU": {"activation": "gelu"},
    "SparseReGLU": {"activation": "relu"},
}
IMPLIED = ("learners", "experts")  # attributes that torch reads off the weights


@cache
def device() -> torch.device:
    """Where kernels run; skips the test where they cannot."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 needs a CUDA device")
    return torch.device("cuda")


def run(name: str, arguments: dict[str, Array], **attributes: Any) -> list[Array]:
    """All outputs of one operator of the registry, in its order."""
    operator = OPERATORS[name]
    given = {
        n: torch.from_numpy(np.ascontiguousarray(value)).to(device())
        if value.ndim or value.dtype != np.int64
        else int(value)
        for n, value in arguments.items()
    }
    kernel = kernels(operator.torch_name)
    assert kernel is not None
    told = {n: value for n, value in attributes.items() if n not in IMPLIED}
    results = kernel(**given, **told, **SWITCHES.get(name, {}))
    results = list(results) if isinstance(results, tuple) else [results]
    if "slot" in operator.outputs:  # in torch it comes before kept
        results[-2:] = reversed(results[-2:])
    return [value.cpu().numpy() for value in results]
