"""ONNX files as Programs: ``import_onnx``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.models.onnx_import.importer import import_onnx

__all__ = ["import_onnx"]


def __getattr__(name: str) -> Any:
    if name == "import_onnx":
        from thresher.models.onnx_import.importer import import_onnx

        return import_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
