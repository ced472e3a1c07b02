"""One ``If`` for all that can share it: what lies inside, what stays outside, and the numbers of both branches."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

import thresher.kernels.ops  # noqa: F401
from thresher.compiler.lowering import branch_prompts, to_onnx
from thresher.compiler.program import SourceInfo
from thresher.compiler.trace import trace

WIDTH, MOST = 8, 2


class Chain(torch.nn.Module):
    """Two linears that skip; ``between``: what the way from one to the other passes."""

    def __init__(self, between: str, most: int = MOST) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between, self.most = between, most
        self.first, self.second = (torch.nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.dense = torch.nn.Linear(WIDTH, WIDTH)
        self.register_buffer("limits", torch.full((WIDTH,), 0.7))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        skip, limits = torch.ops.thresher.sparse_linear, self.get_buffer("limits")
        h = skip(x, self.first, limits, MOST)
        aside = h.sigmoid()  # leads to no other linear that skips
        h = torch.tanh(h) * x.cos()
        if self.between == "product":
            h = self.dense(h)
        y = skip(h, self.second, limits, self.most)
        return {"aside": aside, "h": h, "y": y + 1}


@pytest.mark.parametrize(
    ("between", "most", "branches"),
    [("", MOST, 1), ("product", MOST, 2), ("", MOST + 1, 2)],
)
def test_neighbours_that_ask_the_same_share_a_branch(
    between: str, most: int, branches: int
) -> None:
    """A product of its own would be packed twice, and another limit is another question."""
    module = Chain(between, most).eval()
    axes = {"x": {0: "batch", 1: "tokens"}}
    program = trace(module, {"x": torch.zeros(2, 3, WIDTH)}, dynamic=axes, info=SourceInfo("c"))
    model = to_onnx(program)
    branch_prompts(model)
    written = ir.to_proto(model)
    onnx.checker.check_model(written, full_check=True)
    nodes = list(written.graph.node)
    found = [node for node in nodes if node.op_type == "If"]
    assert len(found) == branches
    outside = {node.op_type for node in nodes}
    assert "Sigmoid" in outside
    assert ("Tanh" in outside) is (branches == 2)
    for node in found:
        steps, prompts = (a.g for a in sorted(node.attribute, key=lambda a: a.name, reverse=True))
        kinds = [[n.op_type for n in graph.node] for graph in (steps, prompts)]
        assert [kind.replace("SparseLinear", "MatMul") for kind in kinds[0]] == kinds[1]
        assert "Cos" not in kinds[0]  # depends on no linear, so it is computed once before them
    session = ort.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    for tokens in (1, 2, 3, 5):
        x = torch.randn(1, tokens, WIDTH)
        for name, value in zip(
            program.output_names, session.run(None, {"x": x.numpy()}), strict=True
        ):
            np.testing.assert_allclose(value, module(x)[name].detach(), rtol=1e-4, atol=1e-5)
