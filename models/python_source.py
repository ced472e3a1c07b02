"""``module:function``: a model that the user's own code builds."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from thresher.compiler.errors import ThresherError, UsageError, nearest
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models.options import SourceOptions
from thresher.models.spec import ATTRIBUTE, ModelSpec
from thresher.models.weights import digest, fit, read_weights


def load(name: str, options: SourceOptions) -> Program:
    """Call ``function`` of ``module`` without arguments and trace the module it returns.

    The returned module carries a :class:`ModelSpec` as ``thresher_spec``.  The current folder is
    searched for ``module``.  ``weights`` may name a file to load into the model.

    Raises:
        UsageError: no such module or function, it fails, or what it returns has no spec.
        RefusedError: the model cannot be traced.
    """
    options.allow("module:function", "weights")
    model, spec = _build(name)
    path = None if options.weights in (None, "included") else Path(str(options.weights))
    if path is not None:
        if str(path) in ("pretrained", "random"):
            raise UsageError(f"{name} builds its own weights: give a file or leave --weights out")
        fit(model, read_weights(path), origin=str(path), name=name)
    used = path or spec.weights
    info = SourceInfo(
        source=name,
        weights=path.name if path else "included",
        digest=digest(used) if used else None,
        preprocessing=spec.preprocessing,
        labels=tuple(spec.labels) if spec.labels else None,
        licence=spec.licence,
    )
    return trace(model, spec.example, dynamic=spec.axes(), info=info, outputs=spec.outputs)


def _build(name: str) -> tuple[nn.Module, ModelSpec]:
    with _current_folder():
        function = _function(name)
        try:
            model = function()
        except ThresherError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UsageError(f"{name}() raised {type(error).__name__}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}() returned {type(model).__name__}, not a torch.nn.Module")
    spec = getattr(model, ATTRIBUTE, None)
    if not isinstance(spec, ModelSpec):
        raise UsageError(
            f"the module that {name}() returns says nothing about its inputs: set"
            f" module.{ATTRIBUTE} = thresher.models.spec.ModelSpec(example={{...}})"
        )
    wrong = [key for key, value in spec.example.items() if not isinstance(value, Tensor)]
    if wrong or not spec.example:
        what = f"{wrong[0]!r} is not a tensor" if wrong else "it is empty"
        raise UsageError(f"ModelSpec.example of {name}() must map names to tensors: {what}")
    return model.eval(), spec


def _function(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    module = _module(module_name, name)
    function = getattr(module, function_name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        hint = nearest(function_name, known)
        raise UsageError(f"module {module_name} has no function {function_name!r}{hint}")
    if not callable(function):
        raise UsageError(f"{name} is of type {type(function).__name__}, not a function")
    return function


def _module(module_name: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module {module_name!r} for {name}: run where Python finds it"
            ) from error
        raise UsageError(f"module {module_name} needs {error.name!r}: install it") from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"importing {module_name} raised {type(error).__name__}: {reason}"
        ) from error


@contextmanager
def _current_folder() -> Iterator[None]:
    """Let imports see the current folder, last, as a console script does not."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
