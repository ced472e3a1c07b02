"""Small ONNX files from text, and their outputs by ONNX Runtime, for the tests of the importer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnx.parser
import torch

from thresher.compiler.program import Program


def file_of(text: str, folder: Path) -> Path:
    """A file with the model of ONNX's text form."""
    path = folder / "model.onnx"
    onnx.save(onnx.parser.parse_model(text.replace("'", '"')), path)
    return path


class Spec(Protocol):
    """What is read of an input's specification."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> object: ...
    @property
    def shape(self) -> tuple[int | str, ...]: ...


def feed(specs: Iterable[Spec], batch: int, length: int) -> dict[str, torch.Tensor]:
    """Seeded inputs; axis 0 is the batch, other symbols are the length; masks end in zeros."""
    generator = torch.Generator().manual_seed(batch)
    values: dict[str, torch.Tensor] = {}
    for spec in specs:
        shape = [
            size if isinstance(size, int) else length if axis else batch
            for axis, size in enumerate(spec.shape)
        ]
        if "int64" in str(spec.dtype) and "mask" in spec.name:
            values[spec.name] = torch.ones(shape, dtype=torch.int64)
            values[spec.name][-1, -2:] = 0
        elif "int64" in str(spec.dtype):
            values[spec.name] = torch.randint(0, 50, shape, generator=generator)
        else:
            values[spec.name] = torch.randn(shape, generator=generator)
    return values


def onnxruntime_outputs(path: Path, inputs: dict[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    """Outputs of the file; inputs in the file's order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    given = {n: v.numpy() for n, v in zip(names, inputs.values(), strict=True)}
    found: list[np.ndarray[Any, Any]] = session.run(None, given)
    return found


def targets(program: Program) -> list[str]:
    """Names of the operators, in order."""
    return [
        str(node.target).split(".")[1]
        for node in program.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("aten.")
    ]
