"""Elementwise operators: arithmetic, comparison, logic, rounding, activations, casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from thresher.models.onnx_import.node import HANDLERS, Call, Handler, op, torch_dtype
from thresher.models.onnx_import.values import Host


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Handler:
    return lambda call: function(call.tensor(0))


def _binary(function: Callable[[Any, Any], torch.Tensor]) -> Handler:
    """A size-1 host input enters as a number, which torch fits to the other input's dtype."""

    def handler(call: Call) -> torch.Tensor:
        if isinstance(call.value(0), Host):
            right = call.tensor(1)
            left = call.operand(0, right.dim())
            return function(left if function in _REFLECTED else call.tensor(0), right)
        left = call.tensor(0)
        return function(left, call.operand(1, left.dim()))

    return handler


def _variadic(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Handler:
    def handler(call: Call) -> torch.Tensor:
        result, *rest = call.tensors()
        for other in rest:
            result = function(result, other)
        return result

    return handler


def _divide(a: Any, b: Any) -> torch.Tensor:
    whole = all(not (x.is_floating_point() if isinstance(x, torch.Tensor) else isinstance(x, float))
                for x in (a, b))  # fmt: skip
    return torch.div(a, b, rounding_mode="trunc") if whole else torch.div(a, b)


def _modulo(call: Call) -> torch.Tensor:
    function = torch.fmod if call.integer("fmod") else torch.remainder
    return function(call.tensor(0), call.tensor(1))


def _add(a: Any, b: Any) -> torch.Tensor:
    return torch.add(a, b)


def _subtract(a: Any, b: Any) -> torch.Tensor:
    return torch.sub(a, b) if isinstance(a, torch.Tensor) else torch.rsub(b, a)


def _multiply(a: Any, b: Any) -> torch.Tensor:
    return torch.mul(a, b)


def _power(a: torch.Tensor, b: Any) -> torch.Tensor:
    return torch.pow(a, b).to(a.dtype)


_REFLECTED = {_subtract, _multiply, _add}  # take a number on the left

_BINARY: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Pow": _power,
    "Equal": torch.eq,
    "Less": torch.lt,
    "Greater": torch.gt,
    "LessOrEqual": torch.le,
    "GreaterOrEqual": torch.ge,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}
HANDLERS.update({name: _binary(function) for name, function in _BINARY.items()})
for _name in ("And", "Or", "Xor"):  # these take tensors only
    HANDLERS[_name] = _variadic(_BINARY[_name])

HANDLERS.update(
    {
        "Mod": _modulo,
        "Max": _variadic(torch.maximum),
        "Min": _variadic(torch.minimum),
        "Sum": _variadic(torch.add),
    }
)

_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Asin": torch.asin,
    "Atan": torch.atan,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "com.microsoft::Gelu": F.gelu,
    "com.microsoft::QuickGelu": lambda x: x * torch.sigmoid(1.702 * x),
}
HANDLERS.update({name: _unary(function) for name, function in _UNARY.items()})


@op("Mean")
def mean(call: Call) -> torch.Tensor:
    total, *rest = call.tensors()
    for other in rest:
        total = total + other
    return total / len(call)


@op("Gelu")
def gelu(call: Call) -> torch.Tensor:
    return F.gelu(call.tensor(0), approximate=call.text("approximate", "none"))


@op("com.microsoft::FastGelu", "com.microsoft::BiasGelu")
def biased_gelu(call: Call) -> torch.Tensor:
    x = call.tensor(0) + call.tensor(1) if call.has(1) else call.tensor(0)
    return F.gelu(x, approximate="tanh" if call.node.op == "FastGelu" else "none")


@op("IsInf")
def is_infinite(call: Call) -> torch.Tensor:
    up, down = call.integer("detect_positive", 1), call.integer("detect_negative", 1)
    x = call.tensor(0)
    if up and down:
        return torch.isinf(x)
    return torch.isposinf(x) if up else torch.isneginf(x) if down else torch.zeros_like(x).bool()


@op("Swish")
def swish(call: Call) -> torch.Tensor:
    x, alpha = call.tensor(0), call.number("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@op("LeakyRelu")
def leaky_relu(call: Call) -> torch.Tensor:
    return F.leaky_relu(call.tensor(0), call.number("alpha", 0.01))


@op("Elu")
def elu(call: Call) -> torch.Tensor:
    return F.elu(call.tensor(0), call.number("alpha", 1.0))


@op("Celu")
def celu(call: Call) -> torch.Tensor:
    return F.celu(call.tensor(0), call.number("alpha", 1.0))


@op("PRelu")
def prelu(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    return torch.where(x < 0, x * call.tensor(1), x)


@op("HardSigmoid")
def hard_sigmoid(call: Call) -> torch.Tensor:
    line = call.tensor(0) * call.number("alpha", 0.2) + call.number("beta", 0.5)
    return torch.clamp(line, 0.0, 1.0)


@op("Clip")
def clip(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    low, high = (
        call.operand(index, 0) if call.has(index) else call.node.attributes.get(name)
        for index, name in ((1, "min"), (2, "max"))
    )
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        low, high = (None if v is None else torch.as_tensor(v, dtype=x.dtype) for v in (low, high))
    return x if low is None and high is None else torch.clamp(x, low, high)


@op("Where")
def where(call: Call) -> torch.Tensor:
    condition, yes, no = call.tensor(0), call.value(1), call.value(2)
    if isinstance(yes, Host) and isinstance(no, Host) and yes.dtype != torch.get_default_dtype():
        return torch.where(condition, yes.tensor(), no.tensor())  # numbers would change the dtype
    rank = max(condition.dim(), call.rank(1), call.rank(2))
    return torch.where(condition, call.operand(1, rank), call.operand(2, rank))


@op("Cast")
def cast(call: Call) -> torch.Tensor:
    return _to(call.tensor(0), torch_dtype(call.integer("to")))


@op("CastLike")
def cast_like(call: Call) -> torch.Tensor:
    return _to(call.tensor(0), call.tensor(1).dtype)


def _to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A cast to the same dtype would leave a node that checks it."""
    return x if x.dtype == dtype else x.to(dtype)
