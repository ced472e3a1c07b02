"""From an ONNX file to a Program."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thresher.compiler.errors import RefusedError
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models.onnx_import.dry_run import Input
from thresher.models.onnx_import.graph import raised
from thresher.models.onnx_import.inputs import (
    Shapes,
    example_sizes,
    fixed_channels,
    inputs_of,
    settle,
)
from thresher.models.onnx_import.module import OnnxModule
from thresher.models.onnx_import.names import identifier
from thresher.models.onnx_import.node import HANDLERS
from thresher.models.onnx_import.raise_attention import LOOKED_FOR
from thresher.models.onnx_import.reading import read


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
    eager = build(path, shapes or {})
    example = {identifier(spec.name): spec.example(eager.sizes) for spec in eager.inputs}
    dynamic = {
        identifier(spec.name): {
            axis: identifier(size) for axis, size in enumerate(spec.shape) if isinstance(size, str)
        }
        for spec in eager.inputs
    }
    origin = info or SourceInfo(source=str(path), digest=_digest(path))
    try:
        return trace(eager.module, example, dynamic=dynamic, info=origin, outputs=eager.outputs)
    except RefusedError as error:
        free = sorted({name for axes in dynamic.values() for name in axes.values()})
        if not free:
            raise
        raise RefusedError(
            f"{path} cannot be traced with {', '.join(free)} dynamic ({_first_line(error)}):"
            " give these axes fixed sizes in the shapes of the inputs"
        ) from error


@dataclass(frozen=True)
class Eager:
    """A file as a module that torch can run and trace, with its contract."""

    module: OnnxModule
    inputs: list[Input]
    outputs: list[str]
    sizes: Mapping[str, int]  # an example size for each dynamic axis


def build(path: Path, shapes: Shapes) -> Eager:
    """The eager module of a file; arguments and errors are those of :func:`import_onnx`."""
    model, own = read(path, HANDLERS.keys())
    inputs = [fixed_channels(model, spec) for spec in inputs_of(path, model, shapes)]
    outputs = [value.name or "" for value in model.graph.outputs]
    sizes = example_sizes(inputs)
    nodes, facts, count, fate = raised(model, inputs, sizes)
    if count == 0:
        raise RefusedError(
            f"{path} is not a transformer: no attention was found (looked for {LOOKED_FOR});"
            " give a model with attention, or export it without fusing attention"
        )
    inputs, sizes = settle(path, inputs, fate, sizes)
    module = OnnxModule(
        nodes,
        facts,
        {spec.name: identifier(spec.name) for spec in inputs},
        [value.name or "" for value in model.graph.outputs],
        own | facts.made,
    )
    return Eager(module, inputs, outputs, sizes)


def _first_line(error: RefusedError) -> str:
    """What torch said, without its hint for its own developers."""
    lines = str(error.__cause__ or error).partition(" For more information")[0].splitlines()
    return next((line.strip() for line in lines if line.strip()), "no reason given")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
