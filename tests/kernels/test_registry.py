"""What the registry says of its operators: bodies that every back end takes, schemas, and that it stays light."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest
import torch

import thresher.kernels.ops  # noqa: F401
from tests.kernels.back_ends import OPSET
from thresher.kernels.registry import OPERATORS

ops = torch.ops.thresher


@pytest.mark.parametrize(
    "name",
    [
        "BipartiteMerge",
        "RankedBipartiteMerge",
        "KeepTokens",
        "FuseTokens",
        "PruneMerge",
        "SelectDiverse",
        "RedundantMerge",
        "SplitMerge",
        "SoftMerge",
    ],
)
def test_outputs_that_nobody_reads_cost_nothing(name: str) -> None:
    operator = OPERATORS[name]
    sizes = [len(operator.function(OPSET, n).node) for n in range(1, len(operator.outputs) + 1)]
    assert sizes == sorted(sizes)
    assert sizes[-2] < sizes[-1]  # the map of slots is the dear one
    short = operator.function(OPSET, 1)
    nodes = [*short.node, *(n for node in short.node for a in node.attribute for n in a.g.node)]
    read = {name for node in nodes for name in node.input} | {"y"}
    assert all(read.intersection(node.output) for node in short.node)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_bodies_hold_only_what_every_back_end_takes(name: str) -> None:
    function = OPERATORS[name].function(OPSET)
    inner = [n for node in function.node for a in node.attribute for n in a.g.node]
    used = {node.op_type for node in (*function.node, *inner)}
    if not OPERATORS[name].portable:
        assert used & {"Compress"}
        return
    assert not used & {"NonZero", "Compress", "Unique", "OneHot", "ScatterElements", "Attention"}
    reductions = [a for n in function.node for a in n.attribute if a.name == "reduction"]
    assert not reductions
    assert [(o.domain, o.version) for o in function.opset_import] == [("", OPSET)]


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_schema_fits_the_body_and_names_a_registered_operator(name: str) -> None:
    operator = OPERATORS[name]
    schema, function = operator.schema(), operator.function(OPSET)
    assert [i.name for i in schema.inputs] == list(function.input)
    assert [o.name for o in schema.outputs] == list(function.output)
    assert set(function.attribute) <= set(schema.attributes)
    registered = getattr(ops, operator.torch_name).default
    assert str(registered) == f"thresher.{operator.torch_name}.default"


def test_another_opset_is_written_into_the_body() -> None:
    function = OPERATORS["GatherTokens"].function(22)
    assert function.opset_import[0].version == 22
    assert isinstance(function, onnx.FunctionProto)


def test_importing_the_registry_stays_light() -> None:
    code = (
        "import sys, thresher.kernels, thresher.kernels.registry;"
        "print(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
