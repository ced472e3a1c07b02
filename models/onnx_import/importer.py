"""From an ONNX file to a Program."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import to_torch_dtype

from thresher.compiler.errors import RefusedError, UsageError, nearest
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models.onnx_import.dry_run import Input
from thresher.models.onnx_import.graph import raised
from thresher.models.onnx_import.module import OnnxModule
from thresher.models.onnx_import.names import identifier
from thresher.models.onnx_import.node import HANDLERS
from thresher.models.onnx_import.raise_attention import LOOKED_FOR
from thresher.models.onnx_import.reading import read

Shapes = Mapping[str, Sequence[int | str]]
IMAGE_SIDE = 224  # a multiple of every common patch size (7, 8, 14, 16, 28, 32)


def import_onnx(
    path: Path, *, shapes: Shapes | None = None, info: SourceInfo | None = None
) -> Program:
    """Import an ONNX file of a transformer.

    Args:
        path: the file; external data must lie in the same folder.
        shapes: input name to sizes that replace the file's; an int fixes an axis, a string names a
            dynamic one.  Inputs that are not named keep the file's sizes.
        info: origin to keep with the Program; by default the path and the file's digest.

    Returns:
        A Program with the file's inputs (names made identifiers) and outputs.

    Raises:
        UsageError: not a whole ONNX file, data outside its folder, or ``shapes`` do not fit.
        RefusedError: unsupported operators, no attention, already reduced by thresher, or sizes
            that cannot be dynamic.
    """
    path = Path(path)
    model, own = read(path, HANDLERS.keys())
    inputs = [_fixed_channels(model, spec) for spec in _inputs(path, model, shapes or {})]
    names = [value.name or "" for value in model.graph.outputs]
    sizes = _sizes(inputs)
    nodes, facts, count, fate = raised(model, inputs, sizes)
    if count == 0:
        raise RefusedError(
            f"{path} is not a transformer: no attention was found (looked for {LOOKED_FOR});"
            " give a model with attention, or export it without fusing attention"
        )
    inputs, renamed = _settle(path, inputs, fate, sizes)
    module = OnnxModule(
        nodes,
        facts,
        {spec.name: identifier(spec.name) for spec in inputs},
        [value.name or "" for value in model.graph.outputs],
        own | facts.made,
    )
    example = {identifier(spec.name): spec.example(renamed) for spec in inputs}
    dynamic = {
        identifier(spec.name): {
            axis: identifier(size) for axis, size in enumerate(spec.shape) if isinstance(size, str)
        }
        for spec in inputs
    }
    return trace(
        module,
        example,
        dynamic=dynamic,
        info=info or SourceInfo(source=str(path), digest=_digest(path)),
        outputs=names,
    )


def _inputs(path: Path, model: ir.Model, shapes: Shapes) -> list[Input]:
    """The graph's inputs with ``shapes`` applied; axes without a name get one."""
    values = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    found = [_input(value) for value in values]
    known = {spec.name for spec in found}
    for name in shapes:
        if name not in known:
            raise UsageError(f"{path} has no input {name!r}{nearest(name, known)}")
    return [_override(path, spec, shapes.get(spec.name)) for spec in found]


def _input(value: ir.Value) -> Input:
    name = value.name or ""
    if value.shape is None or value.dtype is None:
        raise RefusedError(
            f"input {name!r} has no declared rank or type: export the model with input shapes"
        )
    shape = [
        size if isinstance(size, int) else _symbol(size.value, identifier(name), axis)
        for axis, size in enumerate(value.shape)
    ]
    return Input(name, to_torch_dtype(value.dtype), tuple(shape))


def _symbol(given: str | None, name: str, axis: int) -> str:
    """The file's name of a dynamic axis; an exporter's counter (``s77``) says nothing."""
    if given and not re.fullmatch(r"(s|u|unk__)\d+", given):
        return given
    return given or f"{name}_{axis}" if axis else "batch"


def _fixed_channels(model: ir.Model, spec: Input) -> Input:
    """Some files call every axis of an image dynamic; the first convolution knows the channels."""
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "Conv" else None
        while source is not None and (up := source.producer()) is not None and up.op_type == "Cast":
            source = up.inputs[0]
        weight = node.inputs[1] if source is not None and source.name == spec.name else None
        if weight is not None and weight.const_value is not None and isinstance(spec.shape[1], str):
            group = node.attributes.get_int("group", 1) or 1
            channels = int(weight.const_value.shape.numpy()[1]) * group
            return Input(spec.name, spec.dtype, (spec.shape[0], channels, *spec.shape[2:]))
    return spec


def _override(path: Path, spec: Input, asked: Sequence[int | str] | None) -> Input:
    if asked is None:
        return spec
    if len(asked) != len(spec.shape):
        raise UsageError(
            f"input {spec.name!r} of {path} has {len(spec.shape)} axes {list(spec.shape)}"
            f" and the shape given has {len(asked)}: give one size or name for each axis"
        )
    return Input(spec.name, spec.dtype, tuple(asked))


def _sizes(inputs: Iterable[Input]) -> dict[str, int]:
    """An example size for every symbol: all different, not 0 or 1, images with room for patches."""
    sizes: dict[str, int] = {}
    small = iter((2, 5, 9, 11, 13, 17, 19, 23, 25, 27))
    for spec in inputs:
        image = len(spec.shape) == 4 and spec.dtype.is_floating_point
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and size not in sizes:
                sides = sum(value % IMAGE_SIDE == 0 for value in sizes.values())
                spatial = image and axis >= 2
                sizes[size] = IMAGE_SIDE * (sides + 1) if spatial else next(small)
    return sizes


def _settle(
    path: Path, inputs: Sequence[Input], fate: Mapping[str, Any], sizes: Mapping[str, int]
) -> tuple[list[Input], dict[str, int]]:
    """Give equal symbols one name; refuse a symbol that the graph fixes."""
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    for symbol, became in fate.items():
        if isinstance(became, int):
            spec = next(spec for spec in inputs if symbol in spec.shape)
            axis = spec.shape.index(symbol)
            raise RefusedError(
                f"axis {axis} ({symbol!r}) of input {spec.name!r} of {path} cannot be dynamic:"
                f" the graph holds for size {became} only, so give a size in its shape"
            )
        names[symbol] = first.setdefault(str(became), symbol)
    settled = [
        Input(s.name, s.dtype, tuple(names.get(d, d) if isinstance(d, str) else d for d in s.shape))
        for s in inputs
    ]
    return settled, {name: sizes[name] for name in names.values()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
