"""The text form: stable, complete, without weights."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.compiler.broken import PROGRAM, Idle, Negate, negated, rewritten
from tests.compiler.toys import Block, Toy, traced
from thresher.compiler.contract import Context
from thresher.compiler.pipeline import run_passes
from thresher.compiler.text import op_counts, op_delta, size_text
from thresher.passes.tokens.methods import Tome, TomeOptions


def line(text: str, name: str) -> str:
    (found,) = [one for one in text.splitlines() if one.startswith(f"{name} = ")]
    return found


def test_a_line_shows_operator_shape_and_origin() -> None:
    text = PROGRAM.text()
    assert line(text, "x") == "x = input : float32 [batch, 9, 16]"
    assert line(text, "p_head_bias") == "p_head_bias = weight head.bias : float32 [4]"
    assert line(text, "linear") == (
        "linear = aten.linear(layer_norm, p_blocks_0_qkv_weight, p_blocks_0_qkv_bias)"
        " : float32 [batch, 10, 48]  # blocks.0.qkv"
    )
    assert text.splitlines()[:3] == [
        "# imported program of toy, weights included",
        "# input  x : float32 [batch, 9, 16]",
        "# output output : float32 [batch, 4]",
    ]
    assert text.endswith("return [linear_4]\n")


def test_every_node_has_one_line_and_no_weight_is_printed() -> None:
    text = PROGRAM.text()
    body = [one for one in text.splitlines() if not one.startswith("#")]
    assert len(body) == len(PROGRAM.graph.nodes)
    assert "tensor(" not in text
    assert max(map(len, body)) < 300


def test_the_text_depends_on_the_model_alone() -> None:
    assert (
        traced(Toy(Block())).text()
        == PROGRAM.text()
        == rewritten(PROGRAM).text().replace("aten.reshape(", "aten.view(")
    )


def test_history_tokens_and_provenance_are_shown() -> None:
    idle = Idle()
    idle.allow_zero = True
    text = run_passes(PROGRAM, [Tome(TomeOptions(r=3)), idle]).text()
    assert re.search(r"^# pass   tome\(r=3, .*prop_attn=True.*\): matched 1, applied 1", text, re.M)
    assert "# pass   idle(): matched 3, applied 0, refused 3" in text
    assert "# tokens block 0: 10 -> 7 tokens by tome (bipartite_merge)" in text
    assert line(text, "bipartite_merge").endswith("# blocks.0  @tome")
    assert "seconds" not in text


def test_symbols_have_the_users_names() -> None:
    text = traced(Toy(Block()), dynamic=True).text()
    assert line(text, "cat").endswith(": float32 [batch, tokens + 1, 16]")
    assert re.search(r"^add\w* = add\(1, sym_size_int\w*\) : size tokens \+ 1", text, re.M)


@pytest.mark.parametrize(
    ("size", "text"), [("s7 + s77*s7", "a + b*a"), ("Max(1, s7)", "Max(1, a)"), (3, "3")]
)
def test_only_whole_symbols_are_renamed(size: object, text: str) -> None:
    assert size_text(size, {"s7": "a", "s77": "b"}) == text


def test_difference_in_operators() -> None:
    after = Negate()(PROGRAM, Context()).program
    assert op_counts(PROGRAM)["aten.linear"] == 5
    assert op_delta(PROGRAM, after) == {"aten.neg": 1, "aten.reshape": 2, "aten.view": -2}
    assert op_delta(after, rewritten(after, negated)) == {"aten.neg": 1}
    assert op_delta(after, dataclasses.replace(after)) == {}
