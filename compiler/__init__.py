"""The compiler: IR, analyses, graph surgery, passes' contract, lowering.  Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Program": "program",
    "SourceInfo": "program",
    "TensorSpec": "program",
    "trace": "trace",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "optimize": "pipeline",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"thresher.compiler.{_PUBLIC[name]}"), name)
