"""Sources that are files or folders: ``FILE.pt2``, ``FILE.onnx`` and what ``optimize`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from thresher.compiler.archive import read_archive
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program, SourceInfo
from thresher.models.options import SourceOptions
from thresher.models.weights import digest, warn_unless_finite


def load_folder(name: str, options: SourceOptions) -> Program:
    """A Program from a folder that ``thresher optimize`` wrote.

    Raises:
        UsageError: the folder was not written by thresher.
    """
    options.allow("FOLDER")
    return Program.load(Path(name))


def load_pt2(name: str, options: SourceOptions) -> Program:
    """A Program from an archive of ``torch.export.save``.

    Dynamic first axes are called ``batch``; other dynamic axes after their input, ``x_2``.

    Raises:
        UsageError: not a whole archive.
        RefusedError: the archive holds code, or a model in training mode.
    """
    options.allow("FILE.pt2")
    path = Path(name)
    exported = read_archive(path)
    _refuse_training(path, exported)
    warn_unless_finite(exported.state_dict, name)
    exported = exported.run_decompositions({})
    info = SourceInfo(source=name, digest=digest(path))
    program = Program(exported, info, output_names=_output_names(exported))
    return Program(exported, info, _axes(program), program.output_names)


def load_onnx(name: str, options: SourceOptions) -> Program:
    """A Program from an ONNX file; ``resolution`` fixes images, ``length`` sequences.

    Raises:
        UsageError: not a whole ONNX file.
        RefusedError: operators outside what is read, or no attention.
    """
    options.allow("FILE.onnx", "resolution", "length")
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give an ONNX file")
    from thresher.models.onnx_import import import_onnx

    return import_onnx(path, shapes=_wished_shapes(path, options))


def _refuse_training(path: Path, exported: ExportedProgram) -> None:
    """Dropout with ``train=True`` is how a model that was not in evaluation mode is told."""
    for node in exported.graph.nodes:
        if node.target is torch.ops.aten.dropout.default and node.args[2]:
            raise RefusedError(
                f"{path} was exported in training mode (node {node.name}):"
                " call model.eval() before torch.export.export"
            )


def _output_names(exported: ExportedProgram) -> tuple[str, ...]:
    """Keys of a returned dict or dataclass; ``output``, ``output_0`` ... otherwise."""
    spec: Any = exported.call_spec.out_spec
    count = len(exported.graph_signature.user_outputs)
    keys = spec.context if spec is not None and isinstance(spec.context, list) else []
    if len(keys) == count and all(isinstance(key, str) for key in keys):
        return tuple(keys)
    return ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))


def _axes(program: Program) -> dict[str, dict[int, str]]:
    """Names for the symbolic axes of the inputs; one symbol has one name."""
    names: dict[str, str] = {}
    axes: dict[str, dict[int, str]] = {}
    for node in program.input_nodes():
        for axis, symbol in _symbolic(node):
            default = f"{node.name}_{axis}" if axis else "batch"
            if symbol not in names:
                names[symbol] = default if default not in names.values() else f"{node.name}_{axis}"
            axes.setdefault(node.name, {})[axis] = names[symbol]
    return axes


def _symbolic(node: fx.Node) -> list[tuple[int, str]]:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise RefusedError(f"input {node.name} is a {type(value).__name__}, and tensors are taken")
    sizes: list[int | torch.SymInt] = list(value.shape)
    return [
        (axis, str(size.node.expr))
        for axis, size in enumerate(sizes)
        if isinstance(size, torch.SymInt)
    ]


def _wished_shapes(path: Path, options: SourceOptions) -> dict[str, tuple[int | str, ...]] | None:
    """The file's own shapes with the wished image size or length put in."""
    if options.resolution is None and options.length is None:
        return None
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # the importer says what is wrong with the file
        return None
    weights = {tensor.name for tensor in graph.initializer}
    shapes = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = [d.dim_value or d.dim_param or f"axis_{i}" for i, d in enumerate(dims)]
        if value.name in weights:
            continue
        if options.resolution is not None and len(sizes) == 4:
            shapes[value.name] = (*sizes[:2], *options.resolution)
        elif options.length is not None and len(sizes) == 2:
            shapes[value.name] = (sizes[0], options.length)
    if not shapes:
        wish = "resolution" if options.resolution else "length"
        raise UsageError(f"{path} has no input that takes a {wish}")
    return shapes
