"""One ONNX node: its attributes before, and its inputs while, it is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from thresher.models.onnx_import.values import Host, Value, of_tensor


@dataclass(frozen=True)
class Node:
    """An ONNX node by names: what to compute, from what, into what."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]  # "" for an input that is left out
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    opset: int
    scope: str  # dotted path of the module that it came from

    @property
    def key(self) -> str:
        return f"{self.domain}::{self.op}" if self.domain else self.op


@dataclass(frozen=True)
class Call:
    """A node with the values of its inputs; what a handler gets."""

    node: Node
    values: Sequence[Value | None]

    def __len__(self) -> int:
        return len(self.values)

    def has(self, index: int) -> bool:
        return index < len(self.values) and self.values[index] is not None

    def value(self, index: int) -> Value:
        value = self.values[index] if index < len(self.values) else None
        if value is None:
            raise ValueError(f"input {index} is missing")
        return value

    def tensor(self, index: int) -> torch.Tensor:
        value = self.value(index)
        return value.tensor() if isinstance(value, Host) else value

    def maybe(self, index: int) -> torch.Tensor | None:
        return self.tensor(index) if self.has(index) else None

    def tensors(self) -> list[torch.Tensor]:
        return [self.tensor(index) for index in range(len(self.values))]

    def host(self, index: int) -> Host:
        """The input as host numbers; a tensor that depends on the model's data is refused."""
        value = self.value(index)
        if isinstance(value, Host):
            return value
        if isinstance(value, torch._subclasses.FakeTensor):
            raise ValueError(f"input {index} is a size or option that depends on the data")
        return of_tensor(value)

    def ints(self, index: int) -> list[Any]:
        """``int`` or symbolic ints."""
        return list(self.host(index).items.flat)

    def scalar(self, index: int) -> Any:
        return self.host(index).items.reshape(-1)[0]

    def operand(self, index: int, rank: int) -> Any:
        """A Python number where that cannot change the result's shape or dtype, else the tensor."""
        value = self.value(index)
        if isinstance(value, Host) and value.items.size == 1 and value.items.ndim <= rank:
            item = value.items.item()
            if not isinstance(item, float) or math.isfinite(item):
                return item  # an archive cannot hold an infinite number
        return self.tensor(index)

    def rank(self, index: int) -> int:
        value = self.value(index)
        return value.items.ndim if isinstance(value, Host) else value.dim()

    def integer(self, name: str, default: int = 0) -> int:
        return int(self.node.attributes.get(name, default))

    def number(self, name: str, default: float = 0.0) -> float:
        return float(self.node.attributes.get(name, default))

    def text(self, name: str, default: str = "") -> str:
        return str(self.node.attributes.get(name, default))

    def listed(self, name: str) -> list[Any] | None:
        found = self.node.attributes.get(name)
        return None if found is None else list(found)

    def axes(self, index: int = 1) -> Sequence[int] | None:
        """The attribute ``axes`` of older opsets, or the input of newer ones."""
        axes = self.listed("axes")
        return axes if axes is not None or not self.has(index) else self.ints(index)


Result = Value | Sequence[Value]
Handler = Callable[[Call], Result]
HANDLERS: dict[str, Handler] = {}


def op(*names: str) -> Callable[[Handler], Handler]:
    """Enter a function in the table of operators as ``Name``, or ``domain::Name``."""

    def enter(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return enter


def torch_dtype(code: int) -> torch.dtype:
    """Torch's dtype of an ONNX element type."""
    return to_torch_dtype(ir.DataType(code))


def fill_value(call: Call) -> tuple[Any, torch.dtype]:
    """The attribute ``value`` of ConstantOfShape: its one item, and its dtype."""
    value = call.node.attributes.get("value")
    if value is None:
        return 0.0, torch.float32
    return value.numpy().reshape(-1)[0].item(), to_torch_dtype(value.dtype)


def torch_tensor(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A copy of an ONNX tensor."""
    values = np.ascontiguousarray(tensor.numpy())
    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy()).reshape(tuple(tensor.shape.numpy()))
