"""Operators of activation sparsity in graphs and engines: one node each, and one branch for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import thresher.kernels.ops  # noqa: F401
from tests.kernels.back_ends import library
from thresher.compiler.lowering import branch_prompts, to_onnx
from thresher.compiler.program import SourceInfo
from thresher.compiler.trace import trace
from thresher.runtime import Engine, export

ops = torch.ops.thresher


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those of branches included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


class Layers(torch.nn.Module):
    """All of the operators in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.gate, self.up, self.down = (
            torch.nn.Parameter(torch.randn(size) / 4)
            for size in ((8, 8), (8, 32), (32, 8), (32, 8))
        )
        self.narrow = torch.nn.Parameter(torch.randn(8, 8).bfloat16())
        self.register_buffer("limits", torch.full((32,), 0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        limits = self.get_buffer("limits")
        x = ops.sparse_linear(x, self.wide, limits[:8], 6)
        x = ops.sparse_linear(x, self.wide, limits[:8], 6, True)
        x = ops.sparse_linear(x, self.narrow, limits[:8], 6)
        y: torch.Tensor = ops.sparse_gated_ffn(x, self.gate, self.up, self.down, limits, "silu", 6)
        return y


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("fp16", 2e-2)])
def test_engines_hold_each_as_one_node(
    precision: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Layers().eval()
    program = trace(
        model,
        {"x": torch.zeros(2, 3, 8)},
        dynamic={"x": {0: "batch"}},
        info=SourceInfo("layers", "random"),
    )
    export(program, tmp_path / "layers", precision=precision, threads=1)
    written = onnx.load(tmp_path / "layers" / "model.onnx")
    found = [n.op_type for n in nodes_of(written.graph) if n.domain == "thresher"]
    narrow = "SparseLinearBf16" if precision == "fp32" else "SparseLinear"
    assert found == ["SparseLinear", "CompactSparseLinear", narrow, "SparseSwiGLU"]
    assert sum(n.op_type == "If" for n in nodes_of(written.graph)) == 1  # for all of them
    for switch in ("off", "on"):
        if switch == "on":
            library()
        monkeypatch.setenv("THRESHER_KERNELS", switch)
        with Engine.load(tmp_path / "layers", threads=1) as engine:
            assert engine.details["kernels"] == ("native" if switch == "on" else "function bodies")
            for batch in (1, 2, 3):
                x = torch.randn(batch, 3, 8)
                (y,) = engine.run({"x": x.numpy()}).values()
                # In half precision what lies on its threshold may fall on either side.
                assert np.abs(y - model(x).detach().numpy()).mean() < most


def test_where_the_number_of_tokens_is_fixed_nothing_branches() -> None:
    program = trace(
        Layers().eval(),
        {"x": torch.zeros(2, 3, 8)},
        dynamic={},
        info=SourceInfo("layers", "random"),
    )
    model = to_onnx(program)
    before = [node.op_type for node in model.graph]
    branch_prompts(model)
    assert [node.op_type for node in model.graph] == before
    assert "SparseSwiGLU" in before
