"""From an eager module to a Program."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from thresher.compiler.errors import RefusedError
from thresher.compiler.program import Program, SourceInfo


def trace(
    model: nn.Module,
    example: Mapping[str, Any],
    *,
    dynamic: Mapping[str, Mapping[int, str]],
    info: SourceInfo,
    outputs: Sequence[str] | None = None,
    least: Mapping[str, int] | None = None,
) -> Program:
    """Trace ``model`` in evaluation mode.

    Args:
        model: returns a tensor, a tuple or a dict of tensors.
        example: name of a ``forward`` argument to a tensor, or to lists and dicts of tensors, whose
            inputs are then named ``argument.0.key``; sizes of dynamic axes must not be 0 or 1.
        dynamic: input name to ``{axis: symbol}``; equal symbols are one dimension.  A sum of symbols
            (``"past + sequence"``) is one that the model itself ties to them.
        info: origin, kept with the Program.
        least: smallest size of a symbol that the model can process, where it is not 1.
        outputs: names of the outputs; by default the dict's keys, or ``output``/``output_0`` ...

    Raises:
        RefusedError: ``torch.export`` cannot trace the model; the message carries its first line.
    """
    dims = {
        name: Dim(_identifier(name), min=(least or {}).get(name, 1))
        for axes in dynamic.values()
        for name in axes.values()
    }
    shapes = pytree.tree_map_with_path(
        lambda path, _: {
            axis: dims[symbol] for axis, symbol in dynamic.get(_name(path), {}).items()
        },
        dict(example),
    )
    try:
        exported = torch.export.export(
            model.eval(), (), dict(example), dynamic_shapes=shapes, strict=False
        ).run_decompositions({})
    except Exception as error:  # torch raises many kinds, all of them about the model
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise RefusedError(
            f"{info.source} cannot be traced by torch.export ({type(error).__name__}: {reason.strip()});"
            " mend the model's data-dependent Python or give an ONNX file of it"
        ) from error
    names = tuple(outputs) if outputs else _output_names(exported)
    nodes = list(exported.graph_signature.user_inputs)
    _, given = pytree.tree_unflatten(nodes, exported.call_spec.in_spec)  # positional, by name
    named = {node: _name(path) for path, node in pytree.tree_leaves_with_path(given)}
    inputs = tuple(named[node] for node in nodes)
    for bounded in [size for size in exported.range_constraints if not size.is_Symbol]:
        del exported.range_constraints[bounded]  # of a sum, whose parts have theirs
    axes = {k: dict(v) for k, v in dynamic.items()}
    return Program(exported, info, axes, names, input_names=inputs)


def _name(path: Sequence[Any]) -> str:
    """Dotted name of a leaf of nested arguments."""
    return ".".join(str(getattr(entry, "key", getattr(entry, "idx", ""))) for entry in path)


def _identifier(name: str) -> str:
    """What ``torch.export`` calls a symbol."""
    return re.sub(r"\W+", "_", name)


def _output_names(exported: ExportedProgram) -> tuple[str, ...]:
    spec: Any = exported.call_spec.out_spec
    count = len(exported.graph_signature.user_outputs)
    if spec is not None and spec.type is dict and len(spec.context) == count:
        return tuple(str(key) for key in spec.context)
    return ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))
