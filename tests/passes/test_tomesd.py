"""ToMeSD: what merging around attention leaves alone, where it is refused, and wrong options."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.compiler.lowered import RUN, error, proto
from tests.compiler.toys import HEADS, TOKENS, WIDTH, Block, TokenConv, Toy, traced
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.recipe import parse_recipe
from thresher.compiler.trace import trace
from thresher.passes.tokens.methods import Tome, TomeOptions
from thresher.passes.tokens.tomesd import Tomesd, TomesdOptions

SIDE, WINDOW = 8, 4
GRID = (2, SIDE, SIDE, WIDTH)


def run(program: Program, **options: Any) -> PassResult:
    return Tomesd(TomesdOptions(**options))(program, Context())


class GridBlock(nn.Module):
    """Attention on a grid ``[B, S, S, C]``, in windows or globally, heads folded into the batch."""

    def __init__(self, window: int | None, *, positions: bool = False) -> None:
        super().__init__()
        self.window, self.positions = window, positions
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(window or SIDE, WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        y, side, n = self.norm(x), self.window or SIDE, SIDE // (self.window or SIDE)
        if self.window:
            y = y.view(-1, n, side, n, side, WIDTH).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(-1, side * side, WIDTH)
        rows = y.shape[0]
        qkv = self.qkv(y).view(rows, side * side, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, rows * HEADS, side * side, -1).unbind(0)
        bias = None
        if self.positions:
            by_row = torch.einsum("bhwc,kc->bhwk", q.view(-1, side, side, q.shape[-1]), self.table)
            spread = by_row[..., None].expand(-1, -1, -1, -1, side)
            bias = spread.reshape(-1, side * side, side * side)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.view(rows, HEADS, side * side, -1).transpose(1, 2).reshape(rows, side * side, WIDTH)
        y = self.proj(y)
        if self.window:
            y = y.view(-1, n, n, side, side, WIDTH).permute(0, 1, 3, 2, 4, 5)
        mixed: Tensor = x + y.reshape(-1, SIDE, SIDE, WIDTH)
        return mixed


@cache
def windowed(**options: Any) -> Program:
    """Two windowed blocks, a global one between them."""
    torch.manual_seed(0)
    blocks = [GridBlock(w, **options) for w in (WINDOW, None, WINDOW)]
    model = nn.Sequential(*blocks).double()
    wrapped = _Named(model)
    return trace(
        wrapped, {"x": torch.randn(GRID).double()}, dynamic={"x": {0: "batch"}},
        info=SourceInfo("windowed"),
    )  # fmt: skip


@cache
def halved() -> Program:
    return run(windowed(), keep=0.5).program


class _Named(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


def test_windows_and_global_attention_are_merged_and_no_count_changes() -> None:
    program = windowed()
    assert (
        Tome(TomeOptions(r=2))(program, Context())
        .refused[-1]
        .reason.endswith(
            "use tomesd, which merges before an attention and puts tokens back behind it"
        )
    )
    result = run(program, keep=0.75)
    assert (result.matched, result.applied, result.refused) == (3, 3, ())
    assert result.details["attended"] == {0: [16, 12], 1: [64, 48], 2: [16, 12]}
    assert result.details["macs"] + result.details["inserted_macs"] == total_macs(
        result.program.graph
    )
    assert result.program.run({"x": torch.randn(GRID).double()})["output"].shape == GRID


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 3))
def test_merging_equal_neighbours_changes_nothing(seed: int, batch: int) -> None:
    """Half of the tokens merge, each with its equal, and attention counts both: the dense result."""
    program = windowed()
    reduced = halved()
    torch.manual_seed(seed)
    half = torch.randn(batch, SIDE, SIDE // 2, WIDTH).double()
    x = half.repeat_interleave(2, dim=2)
    merged = reduced.run({"x": x})["output"]
    torch.testing.assert_close(merged, program.run({"x": x})["output"], rtol=3e-6, atol=3e-6)


def test_windows_count_as_often_as_there_are_in_an_item() -> None:
    qkv_and_proj, tokens = 4 * WIDTH * WIDTH, SIDE * SIDE
    attention = 2 * WIDTH * tokens * (WINDOW * WINDOW + tokens + WINDOW * WINDOW)
    assert total_macs(windowed().graph) == 3 * tokens * qkv_and_proj + attention


def test_positions_computed_from_queries_are_refused() -> None:
    result = run(windowed(positions=True))
    assert (result.applied, len(result.refused)) == (0, 3)
    assert "needs every token in place" in result.refused[0].reason
    assert result.refused[0].node in result.refused[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("back_end", list(RUN))
def test_windows_run_on_back_ends(back_end: str) -> None:
    torch.manual_seed(0)
    model = _Named(nn.Sequential(GridBlock(WINDOW), GridBlock(None)))
    x = {"x": torch.randn(GRID)}
    program = trace(model, x, dynamic={"x": {0: "batch"}}, info=SourceInfo("windowed"))
    made = run(program, keep=0.6).program
    assert error(RUN[back_end](proto(made), x), made, x) < 1e-5


def test_blocks_with_a_convolution_behind_them_are_merged() -> None:
    program = traced(Toy(Block(mixer=TokenConv()), Block(), pool="dense"), dynamic=True)
    assert Tome(TomeOptions(keep=0.7, layers=(0,)))(program, Context()).refused
    made = run(program, keep=0.6).program
    for tokens in (TOKENS, 14):
        output = made.run({"x": torch.randn(3, tokens, WIDTH)})["output"]
        assert output.shape == (3, tokens + 1, 4)


def test_nothing_to_merge_is_no_change() -> None:
    program = traced(Toy())
    for options in ({"keep": 1.0}, {"r": 0}):
        result = run(program, **options)
        assert (result.applied, result.program) == (0, program)


def test_a_budget_is_met_and_never_exceeded() -> None:
    details = run(traced(Toy()), flops=0.9).details
    assert 0.8 < details["macs"] / details["dense_macs"] <= 0.9
    with pytest.raises(VerdictError, match="cannot be met"):
        run(traced(Toy()), flops=0.2)


def test_mlerp_is_another_result_than_the_mean() -> None:
    x = {"x": torch.randn(2, TOKENS, WIDTH)}
    mean, longest = (
        run(traced(Toy()), combine=combine).program.run(x)["output"]
        for combine in ("mean", "mlerp")
    )
    assert not torch.allclose(mean, longest)


def test_refusals_and_wrong_options() -> None:
    causal = run(traced(Toy(Block(causal=True), Block(causal=True))))
    assert [r.reason.endswith("depend on the order of earlier ones") for r in causal.refused] == [
        True,
        True,
    ]
    with pytest.raises(UsageError, match="r=9 removes more than the 4 of 10 tokens"):
        run(traced(Toy()), r=9)
    with pytest.raises(UsageError, match="layers=2 does not exist: the model has 2"):
        run(traced(Toy()), layers=(2,))
    with pytest.raises(ValueError, match="one budget only"):
        TomesdOptions(r=1, keep=0.6)
    reduced = Tome(TomeOptions(r=1))(traced(Toy()), Context()).program
    assert "start from the original model" in run(reduced).refused[0].reason


def test_a_second_run_is_refused() -> None:
    recipe = parse_recipe("passes: [tomesd, {tomesd: {allow_zero: true}}]", "r.yaml")
    records = optimize(traced(Toy()), recipe).history
    assert [record.applied for record in records] == [2, 0]
