"""From a Program to an ONNX model at opset 20 with one ``thresher`` node per inserted step."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common
import torch

from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.lowering.lint import check
from thresher.compiler.lowering.origin import note_origins
from thresher.compiler.lowering.precision import HALF
from thresher.compiler.lowering.prepare import LOWERING, prepare
from thresher.compiler.lowering.table import translations
from thresher.compiler.program import Program
from thresher.kernels.registry import DOMAIN, OPERATORS, OUTPUTS, VERSION, called

OPSET = 20
PRECISIONS = ("fp32", *HALF)


def to_onnx(program: Program, *, precision: str = "fp32") -> ir.Model:
    """Lower a Program; the weights are shared with it, not copied, until the model is saved.

    Args:
        program: any Program whose operators ONNX can express.
        precision: ``"fp32"``, or ``"fp16"`` or ``"bf16"`` with float32 inputs, outputs and islands.

    Raises:
        UsageError: unknown precision.
        RefusedError: an operator has no ONNX form, or the result breaks a rule of the lowering.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown; choose {' or '.join(PRECISIONS)}")
    prepared = prepare(program, precision)
    try:
        with _quiet():
            exported = torch.onnx.export(
                prepared.exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translations(),
                input_names=[spec.name for spec in program.inputs],
                output_names=[spec.name for spec in program.outputs],
                optimize=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise RefusedError(
            f"{program.info.source} cannot be written as ONNX: {_reason(error)}"
        ) from error
    assert exported is not None
    model: ir.Model = exported.model
    note_origins(model, prepared, LOWERING)
    _name_axes(model, program)
    _add_functions(model)
    check(model)
    ir.passes.common.CheckerPass()(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about its own internals; neither is for our users."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger = logging.getLogger("torch.onnx")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


def _name_axes(model: ir.Model, program: Program) -> None:
    """Symbolic axes under the user's names: of inputs, outputs and everything between them."""
    for shape, value in ((v.shape, v) for node in model.graph for v in node.outputs):
        if shape is not None:
            value.shape = ir.Shape([_named(size, program.symbols) for size in shape])
    for values, specs in (
        (model.graph.inputs, program.inputs),
        (model.graph.outputs, program.outputs),
    ):
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape(spec.shape)


def _named(size: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    """One size, such as ``(7*tokens + 9)//10``; None where the exporter knows none."""
    if isinstance(size, int):
        return size
    text = size.value
    return text and re.sub(r"\bs\d+\b", lambda match: symbols.get(match[0], match[0]), str(text))


def _add_functions(model: ir.Model) -> None:
    """Append the bodies of the operators that the graph calls, without outputs that nobody reads.

    An operator with one body goes by its own name, which native kernels are found by; several bodies need
    names of their own, as not every back end knows the overloads of a function.
    """
    used: dict[str, dict[str, list[ir.Node]]] = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            kind = OPERATORS[node.op_type].kind(_attributes(node))
            used.setdefault(node.op_type, {}).setdefault(kind, []).append(node)
    for operator, kinds in sorted(used.items()):
        for kind, nodes in sorted(kinds.items()):
            _add_function(model, operator if len(kinds) == 1 else kind, nodes)
    if used:
        model.graph.opset_imports[DOMAIN] = VERSION


def _add_function(model: ir.Model, name: str, nodes: list[ir.Node]) -> None:
    """One body and the nodes that call it."""
    count, attributes = max(_read(node) for node in nodes), _attributes(nodes[0])
    for node in nodes:
        node.op_type = name
        node.resize_outputs(count)
        node.attributes.add(ir.AttrInt64(OUTPUTS, count))
    written = called(name).function(OPSET, count, attributes, name)
    function = ir.serde.deserialize_function(written)
    model.functions[function.identifier()] = function


def _attributes(node: ir.Node) -> dict[str, Any]:
    """What the operator itself declares."""
    return {name: node.attributes[name].value for name in OPERATORS[node.op_type].attributes}


def _read(node: ir.Node) -> int:
    """How many outputs, from the first on, somebody reads; at least one."""
    read = [i for i, o in enumerate(node.outputs) if o.uses() or o.is_graph_output()]
    return max(read, default=0) + 1
