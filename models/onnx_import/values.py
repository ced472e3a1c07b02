"""What flows along the edges while an ONNX graph is evaluated: tensors, and small host arrays.

ONNX computes shapes with tensors.  ``torch.export`` can follow a dynamic size only while it stays a
Python number, so everything that comes from ``Shape`` lives in a :class:`Host` array whose items
are ``int``, ``float``, ``bool`` or torch's symbolic numbers, and becomes a tensor only where the
graph mixes it with real data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

HOST_LIMIT = 64  # items; longer arrays are data, not shapes

Items = npt.NDArray[np.object_]
_ROUNDED: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float16: np.float16}


@dataclass(frozen=True)
class Host:
    """A small array on the host.  ``source`` gives the same values as a tensor the model owns."""

    items: Items
    dtype: torch.dtype
    source: Callable[[], torch.Tensor] | None = None

    @property
    def static(self) -> bool:
        """Whether every item is a plain number."""
        return all(isinstance(item, int | float) for item in self.items.flat)

    def tensor(self) -> torch.Tensor:
        """The array as a tensor; symbolic items stay symbolic."""
        if self.source is not None:
            return self.source()
        if self.items.size == 1:
            return torch.full(self.items.shape, self.items.item(), dtype=self.dtype)
        if self.static:
            return torch.tensor(self.items.tolist(), dtype=self.dtype).reshape(self.items.shape)
        flat: list[Any] = list(self.items.flat)
        parts = [torch.scalar_tensor(item, dtype=self.dtype) for item in flat]
        return torch.stack(parts).reshape(self.items.shape)


Value = torch.Tensor | Host


def array(items: Iterable[Any], shape: tuple[int, ...] | None = None) -> Items:
    """Object array of the items as they are (numpy would otherwise convert or unpack them)."""
    flat = list(items)
    result = np.empty(len(flat), dtype=object)
    for index, item in enumerate(flat):
        result[index] = item
    return result if shape is None else result.reshape(shape)


def host(items: Iterable[Any], shape: tuple[int, ...] | None, dtype: torch.dtype) -> Host:
    """Host array of a dtype; float32 and float16 items are rounded as a tensor would."""
    return Host(array((rounded(item, dtype) for item in items), shape), dtype)


def rounded(item: Any, dtype: torch.dtype) -> Any:
    if type(item) is float and dtype in _ROUNDED and math.isfinite(item):
        with np.errstate(over="ignore"):
            return float(_ROUNDED[dtype](item))
    return item


def of_tensor(tensor: torch.Tensor, source: Callable[[], torch.Tensor] | None = None) -> Host:
    """Host copy of a real tensor."""
    return Host(array(tensor.reshape(-1).tolist(), tuple(tensor.shape)), tensor.dtype, source)


def fits(shape: Iterable[Any]) -> bool:
    """Whether an array of this shape is small and of known size."""
    sizes = list(shape)
    return all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= HOST_LIMIT


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    return statically_known_true(a == b)
