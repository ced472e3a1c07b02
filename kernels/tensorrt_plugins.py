"""TensorRT plugins of the operators that have CUDA kernels, in Python: to build engines, and to run them.

One class for all: an :class:`~thresher.kernels.operator.Operator` says what a plugin has to know.  The
parser takes a registered plugin instead of the body of a node.  ``enqueue`` calls the CUDA library.
``tensorrt/plugins.cpp`` is the same for programs that have no Python.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from thresher.kernels.cuda_library import Call, Kernels, Tensor
from thresher.kernels.native import CPU, Kind, Library
from thresher.kernels.registry import DOMAIN, OUTPUTS, PLUGIN, WITH_CUDA, Operator

# TensorRT-RTX's parser finds the registry of plugins in a library of this name, which its wheel holds
# under another one only.  A library that is nothing but that name is loaded beforehand.
RTX = "libtensorrt_rtx.so"
NAME = Kind(
    processor="rtx_name",
    sources=(),
    headers=(),
    compilers=CPU.compilers,
    variable=CPU.variable,
    needs=CPU.needs,
    flags=("-shared", f"-Wl,-soname,{RTX}", "-Wl,--no-as-needed"),
)
# TensorRT goes on reading creators and plugins after it has let go of their Python objects.
_ALIVE: list[Any] = []


@contextmanager
def registered(trt: Any, kernels: Kernels) -> Iterator[None]:
    """Make the plugins known to ``trt``, the module of TensorRT or TensorRT-RTX.

    Raises:
        KernelError: the library that the parser of TensorRT-RTX misses cannot be made.
    """
    found = (
        importlib.util.find_spec("tensorrt_rtx_libs") if trt.__name__ == "tensorrt_rtx" else None
    )
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent
        if not (folder / RTX).exists():
            library = Library((f"-L{folder}", f"-l:{RTX}.1"), NAME)
            ctypes.CDLL(str(library.find() or library.build()))
    registry = trt.get_plugin_registry()
    made = [_creator(trt, kernels, operator) for operator in WITH_CUDA.values()]
    _ALIVE.extend(made)
    for creator in made:
        registry.register_creator(creator, DOMAIN)
    try:
        yield
    finally:
        for creator in made:
            registry.deregister_creator(creator)


def _creator(trt: Any, kernels: Kernels, operator: Operator) -> Any:
    plugin = _plugin(trt, kernels, operator)
    kinds = {**operator.attributes, OUTPUTS: int}
    names = {
        int: (np.int32, trt.PluginFieldType.INT32),
        float: (np.float32, trt.PluginFieldType.FLOAT32),
    }

    def fields(values: dict[str, Any]) -> tuple[Any, Any]:
        """The second is the memory of the first."""
        arrays = {name: np.array([values[name]], names[kind][0]) for name, kind in kinds.items()}
        made = [trt.PluginField(n, array, names[kinds[n]][1]) for n, array in arrays.items()]
        return trt.PluginFieldCollection(made), arrays

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            super().__init__()
            self.name = operator.name
            self.plugin_namespace = DOMAIN
            self.plugin_version = PLUGIN["plugin_version"]
            self.field_names, self.memory = fields(
                {**dict.fromkeys(kinds, 0), OUTPUTS: len(operator.outputs)}
            )

        def create_plugin(self, name: str, given: Any, phase: Any) -> Any:
            values = {one.name: np.asarray(one.data).item() for one in given if one.name in kinds}
            values = {OUTPUTS: len(operator.outputs), **values}
            return plugin(values, fields)

    return Creator()


def _plugin(trt: Any, kernels: Kernels, operator: Operator) -> Any:
    """The class of an operator's plugins."""
    tensors = [name for name in operator.inputs if name not in operator.counts]
    types = {"tensor(float)": trt.float32, "tensor(int64)": trt.int64}
    tokens = next(name for name in tensors if operator.inputs[name] == "T")
    dtypes = {
        trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16",
        trt.int64: "int64", trt.int32: "int32", trt.int8: "int8", trt.bool: "bool",
        trt.uint8: "uint8",
    }  # fmt: skip
    spelled = {"float32": "float"}  # as ONNX has it
    allowed = {
        one
        for one, name in dtypes.items()
        if f"tensor({spelled.get(name, name)})" in operator.types
    }

    def call(inputs: Any, outputs: Any, values: dict[str, Any]) -> Call:
        """``inputs`` and ``outputs`` are pairs of an address and a description."""
        described = [
            [
                Tensor.of(address, dtypes.get(one.type, ""), [max(0, axis) for axis in one.dims])
                for address, one in side
            ]
            for side in (inputs, outputs)
        ]
        keep = {"keep": outputs[0][1].dims[1]} if "keep" in operator.counts else {}
        attributes = {name: values[name] for name in operator.attributes}
        return Call.of(described[0], described[1], {**keep, **attributes})

    # The package has no types.
    class Plugin(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        def __init__(self, values: dict[str, Any], fields: Any) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            _ALIVE.append(self)
            self.values, self.fields = values, fields
            self.serialized, self.memory = fields(values)
            self.plugin_name = operator.name
            self.plugin_namespace = DOMAIN
            self.plugin_version = PLUGIN["plugin_version"]
            self.num_outputs = values[OUTPUTS]

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.values, self.fields)

        def get_fields_to_serialize(self) -> Any:
            return self.serialized

        def get_output_data_types(self, given: Any) -> list[Any]:
            kinds = [*operator.outputs.values()][: self.num_outputs]
            return [types.get(kind, given[tensors.index(tokens)]) for kind in kinds]

        def get_output_shapes(self, given: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            shapes = dict(zip(tensors, map(list, given), strict=False))
            counts = {name: one[0] for name, one in zip(operator.counts, shape_inputs, strict=True)}
            found = list(operator.output_shapes(shapes, counts).values())[: self.num_outputs]
            return [trt.DimsExprs(list(shape)) for shape in found]

        def supports_format_combination(self, at: int, given: Any, inputs: int) -> bool:
            one = given[at].desc
            names = [*tensors, *operator.counts][:inputs] + list(operator.outputs)
            kind = {**operator.inputs, **operator.outputs}[names[at]]
            if kind == "T":
                first = given[tensors.index(tokens)].desc.type
                fits = one.type in allowed and one.type == first
            else:
                fits = one.type == types[kind]
            return fits and one.format == trt.TensorFormat.LINEAR

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            class Largest:
                def __init__(self, one: Any) -> None:
                    self.type, self.dims = one.desc.type, one.max

            sides = [[(None, Largest(one)) for one in side] for side in (inputs, outputs)]
            return kernels.workspace(
                operator, call(sides[0][: len(tensors)], sides[1], self.values)
            )

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def enqueue(
            self, inputs: Any, outputs: Any, read: Any, written: Any, workspace: int, stream: int
        ) -> None:
            pairs = list(zip(read, inputs, strict=False))[: len(tensors)]
            made = call(pairs, list(zip(written, outputs, strict=True)), self.values)
            made.stream, made.workspace = stream, workspace
            made.workspace_bytes = kernels.workspace(operator, made)
            kernels.launch(operator, made)

    return Plugin
