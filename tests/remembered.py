"""Models that were traced before in this process are not traced again, and the exporter's own sources are read once.

Many tests trace the same few toys, mostly through a command, and half of what such a command takes is the trace.
What is remembered goes by content: class, attributes and weights of the model, example and axes.  A Program whose
weights were changed since is forgotten, and a model that cannot be pickled is traced every time, as is all that a
process of its own traces.  A test that changes the *code* of a model gives the changed class a name of its own.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from thresher.compiler.program import Program, SourceInfo

LARGEST = 2**22  # numbers in a model: larger ones are rare and would be kept in memory
MOST = 64  # Programs

Trace = Callable[..., Program]


class _Content(pickle.Pickler):
    """Writes tensors by their numbers; by themselves they are written by the address of their storage."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        numbers = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = (type(value), value.dtype, value.shape, value.stride(), value.requires_grad)
        return tuple, ((*kind, numbers),)


def content(*values: Any) -> str | None:
    """A digest of what values hold, or None of values that cannot be pickled."""
    written = io.BytesIO()
    try:
        _Content(written).dump(values)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return None
    return hashlib.sha256(written.getvalue()).hexdigest()


def remembering(trace: Trace) -> Trace:
    """``trace`` that gives the same Program again for a model of the same content."""
    known: dict[str, tuple[Program, str | None]] = {}

    @functools.wraps(trace)
    def remembered(
        model: nn.Module, example: Mapping[str, Any], *, info: SourceInfo, **given: Any
    ) -> Program:
        small = sum(parameter.numel() for parameter in model.parameters()) <= LARGEST
        key = content(model.eval(), dict(example), sorted(given.items())) if small else None
        if key is None:
            return trace(model, example, info=info, **given)
        program, weights = known.pop(key, (None, None))
        if program is None or weights != _weights(program):
            program = trace(model, example, info=info, **given)
        known[key] = program, _weights(program)
        if len(known) > MOST:
            del known[next(iter(known))]
        return replace(program, info=info)

    return remembered


def _weights(program: Program) -> str | None:
    return content(program.exported.state_dict, program.exported.constants)


def read_once() -> None:
    """The exporter parses the source of each of its several hundred functions anew for every model."""
    import onnxscript

    function: Any = onnxscript.TracedOnnxFunction
    function.function_ir = property(functools.cache(function.function_ir.fget))
