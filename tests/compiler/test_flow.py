"""What depends on the values of an input."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from thresher.compiler.analysis.flow import fed
from thresher.compiler.program import SourceInfo
from thresher.compiler.trace import trace


class Halves(nn.Module):
    """Adds half of the input to the learned rows and to an offset made of sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, _ = torch.split(x, 3, dim=-1)
        made = self.rows * torch.arange(x.shape[0])[:, None, None]
        return torch.add(made, first)


def test_values_are_followed_through_splits_and_sizes_are_not() -> None:
    program = trace(
        Halves(), {"x": torch.zeros(2, 4, 6)}, dynamic={"x": {0: "batch"}}, info=SourceInfo("toy")
    )
    found = {str(node.target): node in fed(program) for node in program.graph.nodes}
    pieces = [node for node in program.graph.nodes if node.target is operator.getitem]
    assert pieces
    assert all(node in fed(program) for node in [*pieces, *program.input_nodes()])
    assert found["aten.add.Tensor"]
    assert not any(
        found[f"aten.{name}"] for name in ("sym_size.int", "arange.default", "mul.Tensor")
    )
