"""Lowering to ONNX.  Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {"to_onnx": "onnx_export", "inlined": "inline", "branch_prompts": "prompts"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"thresher.compiler.lowering.{_PUBLIC[name]}"), name)
