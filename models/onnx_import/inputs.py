"""The inputs of an ONNX file: their sizes, the names of dynamic axes, and example sizes for these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import to_torch_dtype

from thresher.compiler.errors import RefusedError, UsageError, nearest
from thresher.models.onnx_import.dry_run import Input
from thresher.models.onnx_import.names import identifier

Shapes = Mapping[str, Sequence[int | str]]
IMAGE_SIDE = 224  # pixels: a multiple of every common patch size (7, 8, 14, 16, 28, 32)
FRAMES, SAMPLES = (
    320,
    16000,
)  # of sound: spectra as [batch, channels, frames], waves as [batch, samples]


def inputs_of(path: Path, model: ir.Model, shapes: Shapes) -> list[Input]:
    """The graph's inputs with ``shapes`` applied; axes without a name get one."""
    values = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    found = [_input(value) for value in values]
    known = {spec.name for spec in found} | {identifier(spec.name) for spec in found}
    for name in shapes:
        if name not in known:
            raise UsageError(f"{path} has no input {name!r}{nearest(name, known)}")
    return [
        _override(path, spec, shapes.get(spec.name, shapes.get(identifier(spec.name))))
        for spec in found
    ]


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


def fixed_channels(model: ir.Model, spec: Input) -> Input:
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


def example_sizes(inputs: Iterable[Input]) -> dict[str, int]:
    """A size for every symbol: all different, not 0 or 1, and large enough for the input's kind."""
    sizes: dict[str, int] = {}
    for spec in sorted(inputs, key=lambda spec: spec.dtype.is_floating_point):
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and size not in sizes:
                start = _least(spec, axis)
                step = start if start > 2 else 3
                sizes[size] = next(n for n in count(start, step) if n not in sizes.values())
    return sizes


def _least(spec: Input, axis: int) -> int:
    """Images need room for patches, sound for the windows of convolutions, tokens for nothing."""
    if axis == 0 or not spec.dtype.is_floating_point:
        return 2
    return {(4, 2): IMAGE_SIDE, (4, 3): IMAGE_SIDE, (3, 2): FRAMES, (2, 1): SAMPLES}.get(
        (len(spec.shape), axis), 2
    )


def settle(
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
