"""Runs one operator as an ONNX node (its body on ONNX Runtime and, inlined, on OpenVINO; its native kernel
in both), or by its CUDA or Triton kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import pytest
from numpy.typing import NDArray

from tests.kernels import cuda_back_end, triton_back_end
from thresher.compiler.lowering.ties import order_ties
from thresher.kernels.native import CPU, SANITIZED, KernelError, Kind, Library
from thresher.kernels.openvino_library import extension
from thresher.kernels.registry import DOMAIN, OPERATORS, PLUGIN, VERSION
from thresher.runtime.backends.onnx_runtime import session_options
from thresher.runtime.backends.openvino import core_with

Array = NDArray[Any]
OPSET = 20
NATIVE_OPENVINO = "native in openvino"
EVERY_DAY = ("onnxruntime", "openvino", "native")
# The second library takes a minute to build.
EVERYWHERE = (*EVERY_DAY, pytest.param(NATIVE_OPENVINO, marks=pytest.mark.slow))
SWITCHED_ON = "THRESHER_TEST_SANITIZED" in os.environ  # the tests again, in a process of their own
BFLOAT16 = "tensor(bfloat16)"
TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    BFLOAT16: np.float32,
}


@cache
def library(kind: Kind = CPU) -> Path:
    """The native kernels, built once for all processes of a run of the tests.

    Skips the test where there is no compiler.
    """
    compilers = (os.environ.get(kind.variable), *kind.compilers)
    if not any(name and shutil.which(name) for name in compilers):
        pytest.skip(f"no compiler: install {kind.needs}")
    found = Library(SANITIZED if SWITCHED_ON else (), kind)
    return found.find() or found.build()


@cache
def openvino_library() -> Path:
    """The native kernels for OpenVINO.

    Skips the test where OpenVINO or a compiler is missing, and under the sanitizers, which the same kernels
    pass in ONNX Runtime.
    """
    if SWITCHED_ON:
        pytest.skip("OpenVINO was not tried under the sanitizers")
    try:
        return library(extension())
    except KernelError as error:
        pytest.skip(str(error))


def demand(back_end: str) -> None:
    """Skip the test where a back end is missing."""
    made = {
        "native": library,
        NATIVE_OPENVINO: openvino_library,
        "cuda": cuda_back_end.kernels,
        "triton": triton_back_end.device,
    }
    made[back_end]() if back_end in made else pytest.importorskip(back_end)


def copied(cache: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind = CPU) -> Path:
    """The library in a cache of the test's own, switched on."""
    built = library(kind)
    monkeypatch.setenv("THRESHER_CACHE", str(cache))
    monkeypatch.delenv("THRESHER_KERNELS")
    shutil.copytree(built.parent, Library(kind=kind).file.parent)
    return Library(kind=kind).file


def model(
    name: str, ranks: tuple[int, ...], token_type: str, attributes: tuple[tuple[str, Any], ...],
    outputs: int | None = None,
) -> onnx.ModelProto:  # fmt: skip
    """One node with every axis of every input symbolic; bfloat16 inputs are cast from float32."""
    operator = OPERATORS[name]
    tokens = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(token_type))

    def kind(text: str) -> int:
        return (
            tokens if text == "T" else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(TYPES[text]))
        )

    inputs = [
        onnx.helper.make_tensor_value_info(n, kind(t), [f"{n}{axis}" for axis in range(rank)])
        for (n, t), rank in zip(operator.inputs.items(), ranks, strict=True)
    ]
    wanted = list(operator.outputs.items())[:outputs]
    results = [
        onnx.helper.make_tensor_value_info(n, kind(t), [f"{n}{axis}" for axis in range(rank)])
        for n, t in wanted
        for rank in [ranks[0] if n == "y" else 2]
    ]
    narrow = [n for n, t in operator.inputs.items() if t == BFLOAT16]
    casts = [
        onnx.helper.make_node("Cast", [n], [f"{n}_bf16"], to=onnx.TensorProto.BFLOAT16)
        for n in narrow
    ]
    node = onnx.helper.make_node(
        operator.name,
        [f"{n}_bf16" if n in narrow else n for n in operator.inputs],
        [n for n, _ in wanted],
        domain=DOMAIN,
        **dict(attributes),
        **PLUGIN,
    )
    graph = onnx.helper.make_graph([*casts, node], name, inputs, results)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    body = operator.function(OPSET, outputs, dict(attributes))
    made = onnx.helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10)
    onnx.checker.check_model(made)
    return made


def with_constants(made: onnx.ModelProto, values: Mapping[str, Array]) -> onnx.ModelProto:
    """The model with these values of some of its inputs as constants; changes it."""
    for given in [one for one in made.graph.input if one.name in values]:
        made.graph.input.remove(given)
        made.graph.initializer.append(onnx.numpy_helper.from_array(values[given.name], given.name))
    return made


@cache
def _onnxruntime(kernels: Path | None, *signature: Any) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(
        model(*signature).SerializeToString(),
        session_options(1 if kernels is None else 3, kernels),
        providers=["CPUExecutionProvider"],
    )


@cache
def _openvino(kernels: Path | None, *signature: Any) -> Any:
    made = model(*signature)
    core = core_with(kernels)
    flat = made if kernels else onnx.inliner.inline_local_functions(made)
    read = core.read_model(flat.SerializeToString())
    order_ties(read)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": 3 if kernels else 1,
    }
    return core.compile_model(read, "CPU", settings)


def run(back_end: str, name: str, arguments: dict[str, Array], **attributes: Any) -> list[Array]:
    """All outputs of one operator; ``arguments`` by input name in order."""
    if back_end == "triton":
        return triton_back_end.run(name, arguments, **attributes)
    if back_end == "cuda":
        return cuda_back_end.run(name, arguments, SANITIZED if SWITCHED_ON else (), **attributes)
    token_type = next(
        str(arguments[n].dtype) for n, t in OPERATORS[name].inputs.items() if t == "T"
    )
    ranks = tuple(value.ndim for value in arguments.values())
    signature = (name, ranks, token_type, tuple(sorted(attributes.items())))
    if back_end in ("onnxruntime", "native"):
        kernels = library() if back_end == "native" else None
        return list(_onnxruntime(kernels, *signature).run(None, arguments))
    kernels = openvino_library() if back_end == NATIVE_OPENVINO else None
    result = _openvino(kernels, *signature)(arguments)
    return [np.array(result[n]) for n in OPERATORS[name].outputs]


@cache
def through_casts(name: str, element: str, threads: int = 2, **attributes: Any) -> Any:
    """A session that casts float32 tokens to a type, runs the native kernel and casts its first output back."""
    import onnxruntime as ort

    make, protos = onnx.helper, onnx.TensorProto
    kind = protos.DataType.Value(
        {"float64": "DOUBLE", "float32": "FLOAT"}.get(element, element.upper())
    )
    operator = OPERATORS[name]
    held = {"tensor(int64)": protos.INT64, "tensor(bool)": protos.BOOL}
    inputs, outputs = (
        [
            make.make_tensor_value_info(n, held.get(sort, protos.FLOAT), None)
            for n, sort in of.items()
        ]
        for of in (operator.inputs, operator.outputs)
    )
    typed = {n for n, sort in operator.inputs.items() if sort == "T"}
    given = [f"{n}_cast" if n in typed else n for n in operator.inputs]
    first, *rest = operator.outputs
    nodes = [
        make.make_node("Cast", [n], [f"{n}_cast"], to=kind) for n in operator.inputs if n in typed
    ]
    nodes.append(make.make_node(name, given, ["typed", *rest], domain=DOMAIN, **attributes))
    back = held.get(operator.outputs[first], protos.FLOAT)
    nodes.append(make.make_node("Cast", ["typed"], [first], to=back))
    opsets = [make.make_opsetid("", OPSET), make.make_opsetid(DOMAIN, VERSION)]
    graph = make.make_graph(nodes, name, inputs, outputs)
    made = make.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(
        made.SerializeToString(),
        session_options(threads, library()),
        providers=["CPUExecutionProvider"],
    )
