"""Layers that exporters take to pieces, put together again: linear, GELU, layer norm, einsum."""

from __future__ import annotations

import math

import onnx_ir as ir

from thresher.models.onnx_import.match import Matcher
from thresher.models.onnx_import.names import scope
from thresher.models.onnx_import.ops_layers import LINEAR

TOLERANCE = 1e-3  # relative, on literals that a float16 file rounds


def raise_layers(m: Matcher) -> None:
    """Rewrite every layer found; what does not match exactly stays as it is."""
    weights: dict[str, ir.Value] = {}
    for node in list(m.graph):
        if node.op_type == "MatMul":
            _linear(m, node, weights)
    for node in list(m.graph):
        if node.op_type in ("Erf", "Tanh"):
            _gelu(m, node)
        elif node.op_type == "Div":
            _layer_norm(m, node)


# --- linear -------------------------------------------------------------------------------------


def _linear(m: Matcher, node: ir.Node, weights: dict[str, ir.Value]) -> None:
    """``MatMul(x, constant [in, out])``, with ``Add(constant [out])`` if it follows."""
    x, factor = node.inputs[0], node.inputs[1]
    matrix = m.constant(factor)
    if x is None or factor is None or matrix is None or matrix.dim() != 2 or not m.shape(x):
        return
    if m.constant(x) is not None:
        return
    name = factor.name or ""
    if name not in weights:
        title = scope(node)
        named = "." in name and "::" not in name  # the file knows better than we do
        title = name if named else f"{title}.weight" if title else "weight"
        weights[name] = m.literal(matrix.t().contiguous(), title)
        m.facts.made.add(weights[name].name or "")
    last, inputs = _absorb(m, node, "Add", [x, weights[name]], matrix.shape[1])
    domain, op = LINEAR.split("::")
    new = m.emit(last, op, inputs, m.shape(node.outputs[0]), domain=domain)
    m.replace(last.outputs[0], new)


def _absorb(
    m: Matcher, node: ir.Node, op: str, inputs: list[ir.Value], width: int
) -> tuple[ir.Node, list[ir.Value]]:
    """The ``op`` by a constant ``[width]`` that alone uses ``node``, and the inputs with it."""
    up = m.consumer(node.outputs[0], op)
    for _, other in m.operands(up) if up else ():
        tensor = m.constant(other)
        if up is not None and tensor is not None and tuple(tensor.shape) == (width,):
            return up, [*inputs, other]
    return node, inputs


# --- GELU ---------------------------------------------------------------------------------------


def _gelu(m: Matcher, node: ir.Node) -> None:
    """``0.5 * x * (1 + erf(x / sqrt 2))``, or with tanh, whatever the order of the factors."""
    plus = m.consumer(node.outputs[0], "Add")
    if plus is None or not any(m.scalar(other) == 1.0 for _, other in m.operands(plus)):
        return
    inner = node.inputs[0]
    end, coefficient, x = plus, 1.0, None
    while inner is not None and (up := m.consumer(end.outputs[0], "Mul", "Div")) is not None:
        other = up.inputs[1] if up.inputs[0] is end.outputs[0] else up.inputs[0]
        number = m.scalar(other)
        if up.op_type == "Div":
            if number is None or up.inputs[1] is not other:
                return
            coefficient /= number
        elif number is not None:
            coefficient *= number
        elif x is None and other is not None:
            found = _gelu_input(m, node.op_type, inner, other)
            if found is None:
                return
            x, share = found
            coefficient *= share
        else:
            return
        end = up
        if x is not None and _close(coefficient, 0.5):
            form = "tanh" if node.op_type == "Tanh" else "none"
            new = m.emit(end, "Gelu", [x], m.shape(end.outputs[0]), {"approximate": form})
            m.replace(end.outputs[0], new)
            return


def _gelu_input(
    m: Matcher, kind: str, inner: ir.Value, factor: ir.Value
) -> tuple[ir.Value, float] | None:
    """Which x makes ``inner`` GELU's polynomial; ``factor`` is x times the returned share."""
    candidates = [(factor, 1.0)]
    half = m.producer(factor, "Mul", "Div")
    if half is not None:
        for x, other in m.operands(half)[: 2 if half.op_type == "Mul" else 1]:
            number = m.scalar(other)
            if number is not None:
                candidates.append((x, number if half.op_type == "Mul" else 1.0 / number))
    root = math.sqrt(2.0 / math.pi)
    wanted = {1: 1.0 / math.sqrt(2.0)} if kind == "Erf" else {1: root, 3: root * 0.044715}
    for x, share in candidates:
        terms = _polynomial(m, inner, x, 8)
        if terms is None or terms.keys() != wanted.keys():
            continue
        if all(_close(terms[degree], wanted[degree]) for degree in wanted):
            return x, share
    return None


def _polynomial(m: Matcher, value: ir.Value, x: ir.Value, depth: int) -> dict[int, float] | None:
    """``{degree: coefficient}`` of a value as a polynomial in ``x``, or None if it is not one."""
    if value is x:
        return {1: 1.0}
    number = m.scalar(value)
    if number is not None:
        return {0: number}
    node = m.producer(value, "Add", "Mul", "Div", "Pow")
    if node is None or depth == 0 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    a = _polynomial(m, node.inputs[0], x, depth - 1)
    b = _polynomial(m, node.inputs[1], x, depth - 1)
    if a is None or b is None:
        return None
    match node.op_type:
        case "Add":
            return {k: a.get(k, 0.0) + b.get(k, 0.0) for k in a.keys() | b.keys()}
        case "Mul":
            product: dict[int, float] = {}
            for i, p in a.items():
                for j, q in b.items():
                    product[i + j] = product.get(i + j, 0.0) + p * q
            return product
        case "Div" if b.keys() == {0}:
            return {k: p / b[0] for k, p in a.items()}
        case "Pow" if b.keys() == {0} and len(a) == 1:
            ((degree, p),) = a.items()
            return {int(degree * b[0]): p ** b[0]}
    return None


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=TOLERANCE)


# --- layer norm ---------------------------------------------------------------------------------


def _layer_norm(m: Matcher, node: ir.Node) -> None:
    """``(x - mean) / sqrt(mean((x - mean)**2) + eps) * weight + bias`` over the last axis."""
    centred, root = node.inputs[0], m.producer(node.inputs[1], "Sqrt")
    below = m.producer(root.inputs[0], "Add") if root else None
    difference = m.producer(centred, "Sub")
    if below is None or difference is None or centred is None:
        return
    x = difference.inputs[0]
    if x is None or _mean_of(m, difference.inputs[1]) is not x:
        return
    for variance, other in m.operands(below):
        eps = m.scalar(other)
        square = m.producer(_mean_of(m, variance), "Pow", "Mul")
        if eps is None or square is None or square.inputs[0] is not centred:
            continue
        if square.op_type == "Pow" and m.scalar(square.inputs[1]) != 2.0:
            continue
        if square.op_type == "Mul" and square.inputs[1] is not centred:
            continue
        _emit_layer_norm(m, node, x, eps)
        return


def _mean_of(m: Matcher, value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is the mean of over the last axis, the axis being kept."""
    node = m.producer(value, "ReduceMean")
    if node is None or node.inputs[0] is None or m.attribute(node, "keepdims", 1) != 1:
        return None
    axes = m.attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        given = m.constant(node.inputs[1])
        axes = None if given is None else given.reshape(-1).tolist()
    rank = len(m.shape(node.inputs[0]))
    return node.inputs[0] if axes is not None and list(axes) in ([-1], [rank - 1]) else None


def _emit_layer_norm(m: Matcher, node: ir.Node, x: ir.Value, eps: float) -> None:
    end, inputs = _absorb(m, node, "Mul", [x], m.shape(x)[-1])
    if len(inputs) > 1:
        end, inputs = _absorb(m, end, "Add", inputs, m.shape(x)[-1])
    new = m.emit(end, "LayerNormalization", inputs, m.shape(x), {"axis": -1, "epsilon": eps})
    m.replace(end.outputs[0], new)


# --- einsum -------------------------------------------------------------------------------------


def raise_einsum(m: Matcher) -> None:
    """Einsum of two operands that is one batched product becomes transposes and MatMul."""
    for node in list(m.graph):
        if node.op_type != "Einsum" or len(node.inputs) != 2 or None in node.inputs:
            continue
        equation = str(m.attribute(node, "equation", "")).replace(" ", "")
        plan = _product_plan(equation)
        if plan is None:
            continue
        left, right, order = plan
        a, b = (
            _transpose(m, node, value, perm)
            for value, perm in zip(node.inputs, (left, right), strict=True)
            if value is not None
        )
        shape = (*m.shape(a)[:-1], m.shape(b)[-1])
        product = m.emit(node, "MatMul", [a, b], shape)
        m.replace(node.outputs[0], _transpose(m, node, product, order))


def _product_plan(equation: str) -> tuple[list[int], list[int], list[int]] | None:
    """Permutations of the operands to ``[batch, m, k]``, ``[batch, k, n]``, and of the result."""
    if "->" not in equation or "." in equation:
        return None
    terms, out = equation.split("->")
    a, b = terms.split(",")
    if any(len(set(term)) != len(term) for term in (a, b, out)):
        return None
    batch = [c for c in a if c in b and c in out]
    k = [c for c in a if c in b and c not in out]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    if not len(k) == len(rows) == len(columns) == 1 or {*a, *b} != {*out, *k}:
        return None
    made = [*batch, *rows, *columns]
    return (
        [a.index(c) for c in (*batch, *rows, *k)],
        [b.index(c) for c in (*batch, *k, *columns)],
        [made.index(c) for c in out],
    )


def _transpose(m: Matcher, node: ir.Node, value: ir.Value, perm: list[int]) -> ir.Value:
    if perm == sorted(perm):
        return value
    shape = m.shape(value)
    permuted = tuple(shape[axis] for axis in perm) if shape else ()
    return m.emit(node, "Transpose", [value], permuted, {"perm": perm})
