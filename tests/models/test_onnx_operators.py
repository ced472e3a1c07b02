"""Operators one by one: ONNX's own cases are computed rightly or refused, never computed wrongly."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from thresher.compiler.errors import RefusedError
from thresher.models.onnx_import.evaluate import compute
from thresher.models.onnx_import.folding import fold
from thresher.models.onnx_import.graph import nodes_of
from thresher.models.onnx_import.host_ops import HOST_HANDLERS
from thresher.models.onnx_import.node import HANDLERS, Call, Node
from thresher.models.onnx_import.values import HOST_LIMIT, Host, Value, of_tensor

# What real encoders are made of must be right in every one of ONNX's cases.
WHOLE = [
    *(
        "Add",
        "Sub",
        "Mul",
        "Pow",
        "Sqrt",
        "Erf",
        "Tanh",
        "Sigmoid",
        "Relu",
        "Gelu",
        "Softmax",
        "Clip",
        "Neg",
        "Abs",
    ),
    *(
        "MatMul",
        "Gemm",
        "Einsum",
        "Conv",
        "LayerNormalization",
        "RMSNormalization",
        "GroupNormalization",
    ),
    *(
        "Shape",
        "Size",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Concat",
        "Split",
        "Slice",
        "Expand",
        "Tile",
    ),
    *(
        "Flatten",
        "ConstantOfShape",
        "Range",
        "Gather",
        "GatherND",
        "GatherElements",
        "Where",
        "Equal",
        "Not",
        "And",
    ),
    *(
        "Or",
        "Trilu",
        "TopK",
        "CumSum",
        "ReduceMean",
        "ReduceSum",
        "ReduceMax",
        "ReduceProd",
        "Identity",
        "Floor",
    ),
    *("Ceil", "GlobalAveragePool", "InstanceNormalization", "DepthToSpace", "RotaryEmbedding"),
]
# Cases of dtypes that torch cannot compute with, and of options that are refused.
REFUSED_CASES = (
    "uint16",
    "uint32",
    "uint64",
    "empty_set",
    "neg_steps",
    "negative_indices",
    "training",
)


def _cases() -> list[tuple[str, Node, list[torch.Tensor | None], list[np.ndarray[Any, Any]]]]:
    """Name, node, inputs and wanted outputs of ONNX's cases of one supported operator each."""
    from onnx.backend.test.case.node import collect_testcases

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    for case in collected:
        if case.model is None or not case.data_sets:
            continue
        graph = case.model.graph
        if len(graph.node) != 1 or graph.node[0].domain or graph.node[0].op_type not in HANDLERS:
            continue
        (node,) = nodes_of(ir.from_proto(case.model))
        inputs, outputs = case.data_sets[0]
        given = dict(zip([value.name for value in graph.input], inputs, strict=False))
        try:
            tensors = [torch.from_numpy(np.array(given[n])) if n else None for n in node.inputs]
        except TypeError:  # sequences, strings, eight-bit floats
            continue
        names = [value.name for value in graph.output]
        wanted = [np.asarray(outputs[names.index(name)]) for name in node.outputs if name in names]
        found.append((case.name, node, tensors, wanted))
    return found


@pytest.fixture(scope="module")
def cases() -> list[Any]:
    return _cases()


def _agrees(found: list[Value], wanted: list[np.ndarray[Any, Any]]) -> None:
    for value, want in zip(found, wanted, strict=False):
        got = (value.tensor() if isinstance(value, Host) else value).numpy()
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        loose = 2e-3 if want.dtype == np.float16 else 1e-4
        np.testing.assert_allclose(
            got.astype(np.float64), want.astype(np.float64), rtol=loose, atol=loose / 10
        )


def test_no_case_of_onnx_is_computed_wrongly(cases: list[Any]) -> None:
    right: Counter[str] = Counter()
    refused: dict[str, list[str]] = defaultdict(list)
    for name, node, inputs, wanted in cases:
        try:
            found = compute(node, list(inputs))
        except RefusedError:
            refused[node.op].append(name)
            continue
        try:
            _agrees(found, wanted)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        right[node.op] += 1
    assert right.total() > 650
    for op in WHOLE:
        assert right[op], op
        assert all(any(word in name for word in REFUSED_CASES) for name in refused[op]), refused[op]


def test_shape_arithmetic_agrees_with_tensors(cases: list[Any]) -> None:
    count = 0
    for name, node, inputs, wanted in cases:
        small = all(value is None or value.numel() <= HOST_LIMIT for value in inputs)
        if node.op not in HOST_HANDLERS or not small:
            continue
        hosts = [None if value is None else of_tensor(value) for value in inputs]
        found = HOST_HANDLERS[node.op](Call(node, hosts))
        if found is None:
            continue
        try:
            _agrees(list(found) if isinstance(found, list) else [found], wanted)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        count += 1
    assert count > 200


def test_constants_fall_back_on_onnx_runtime(cases: list[Any]) -> None:
    """A Resize that torch computes in another way is still right where its inputs are constant."""
    name = "test_resize_downsample_sizes_cubic_antialias"
    node, inputs, wanted = next(case[1:] for case in cases if case[0] == name)
    with pytest.raises(RefusedError, match="antialias"):
        compute(node, list(inputs))
    _agrees(fold(node, list(inputs)), wanted)


def test_refusal_of_constants_keeps_our_reason() -> None:
    node = Node("Resize", "", "grid", ("x", ""), ("y",), {"mode": "cubic"}, 18, "")
    with pytest.raises(
        RefusedError, match=r"node 'grid' \(Resize\) cannot be imported: neither scales"
    ):
        fold(node, [torch.zeros(1, 1, 4, 4), None])


OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "com.microsoft::FastGelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "com.microsoft::Gelu": torch.nn.functional.gelu,
    "com.microsoft::QuickGelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("key", OTHERS)
def test_operators_of_onnx_runtime(key: str) -> None:
    domain, op = key.split("::")
    x = torch.linspace(-3, 3, 12)
    (found,) = compute(Node(op, domain, op, ("x",), ("y",), {}, 17, ""), [x])
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, OTHERS[key](x))


def test_skip_layer_norm_gives_the_sum_too() -> None:
    x, skip, weight, bias = (
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 4),
        torch.randn(4),
        torch.randn(4),
    )
    node = Node(
        "SkipLayerNormalization",
        "com.microsoft",
        "n",
        ("x", "s", "g", "b"),
        ("y", "", "", "t"),
        {},
        17,
        "",
    )
    normal, _, _, total = compute(node, [x, skip, weight, bias])
    torch.testing.assert_close(total, x + skip)
    wanted = torch.nn.functional.layer_norm(x + skip, (4,), weight, bias, 1e-12)
    torch.testing.assert_close(normal, wanted)
