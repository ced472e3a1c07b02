"""Counts print and read back, are resolved as they say, and are emitted as the same arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.compiler.toys import WIDTH, Block, Toy, traced
from thresher.compiler.contract import Context
from thresher.compiler.errors import UsageError
from thresher.compiler.ledger import token_maps
from thresher.compiler.program import Program
from thresher.passes.tokens.budget import Count, Limits, parse, spread
from thresher.passes.tokens.diffrate import DiffRate, DiffRateOptions
from thresher.passes.tokens.methods import Evit, EvitOptions, Tome, TomeOptions, TopkNorm
from thresher.passes.tokens.options import TokenOptions

NUMBERS = st.integers(0, 10**6)
MULTIPLES = st.integers(1, 64)
SHARES = st.fractions(0, 1, max_denominator=1000).filter(lambda value: value > 0)
COUNTS = st.one_of(
    st.builds(Count, st.just("remove"), NUMBERS, st.none(), MULTIPLES),
    st.builds(Count, st.just("share"), SHARES, st.none(), MULTIPLES),
    st.builds(Count, st.just("exact"), NUMBERS, st.none() | NUMBERS, MULTIPLES),
)
STATIC = traced(Toy(Block(), Block(), Block()), tokens=32)
DYNAMIC = traced(Toy(Block(), Block(), Block(), pool="mean"), tokens=64, dynamic=True)


@given(COUNTS)
def test_a_count_reads_back_to_itself(count: Count) -> None:
    assert parse(str(count)) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("-13", Count("remove", 13)),
        ("0.7", Count("share", Fraction(7, 10))),
        ("=150", Count("exact", 150)),
        ("=180>170", Count("exact", 170, pruned=180)),
        ("=180>170~8", Count("exact", 170, pruned=180, multiple=8)),
        ("-13~8", Count("remove", 13, multiple=8)),
    ],
)
def test_the_printed_forms(text: str, count: Count) -> None:
    assert (parse(text), str(count)) == (count, text)


@pytest.mark.parametrize(
    "text", ["", "x", "-", "--3", "=", "=9>", ">9", "=1.5", "nan", "inf", "1.5", "0", "9~0", "0.5~"]
)
def test_what_is_no_count_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a token count: write -13 .* or =180>170"):
        parse(text)


@given(COUNTS, st.integers(0, 300), st.integers(0, 5), st.booleans(), st.integers(0, 1))
def test_what_stays_is_possible_and_a_multiple(
    count: Count, behind: int, protected: int, halves: bool, extra: int
) -> None:
    tokens, limits = protected + behind, Limits(protected, halves, 0 if halves else extra)
    left = count.of(tokens, limits)
    assert limits.least(tokens) <= left <= tokens
    assert left % count.multiple == 0 or left == tokens
    plain = count.rounded(1).of(tokens, limits)
    assert left == min(tokens, ceil(plain / count.multiple) * count.multiple)


def test_pruned_below_merged_is_clamped() -> None:
    limits = Limits(1)
    assert Count("exact", 100, pruned=90).of(120, limits) == 90
    assert Count("exact", 100, pruned=110).of(95, limits) == 95
    assert Count("exact", 3, pruned=3).of(40, limits) == 3


METHODS = {
    "tome": (Tome, TomeOptions),
    "evit": (Evit, EvitOptions),
    "topk-norm": (TopkNorm, TokenOptions),
    "diffrate": (DiffRate, DiffRateOptions),
}
BUDGETS: list[dict[str, Any]] = [
    {"r": 3},
    {"keep": 0.6, "layers": (0, 1, 2)},
    {"flops": 0.75},
    {"counts": (25, 20, 18)},
]


def counts_of(program: Program, tokens: int) -> list[int]:
    """Tokens after each reduction, read off a run on ``tokens`` rows."""
    maps = token_maps(program, {"x": torch.randn(2, tokens, WIDTH)})
    return [one.kept.shape[1] for one in maps]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: next(iter(budget)))
def test_every_budget_of_every_method_rounds_up(method: str, budget: dict[str, Any]) -> None:
    cls, options = METHODS[method]
    result = cls(options(**budget, multiple=4))(STATIC, Context())
    left = counts_of(result.program, 32)
    assert left == list(dict.fromkeys(result.details["tokens"]))[1:]
    assert left
    assert all(count % 4 == 0 for count in left)
    if "flops" in budget:
        assert result.details["macs"] <= 0.75 * result.details["dense_macs"]


@pytest.mark.parametrize("method", ["tome", "topk-norm", "diffrate"])
@pytest.mark.parametrize("budget", [{"r": 9}, BUDGETS[1]], ids=["r", "keep"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_symbolic_counts_are_those_of_the_numbers(
    method: str, budget: dict[str, Any], multiple: int
) -> None:
    cls, options = METHODS[method]
    layers = (0, 1, 2) if multiple == 1 else (1,)  # long arithmetic takes torch long
    result = cls(options(**budget | {"layers": layers}, multiple=multiple))(DYNAMIC, Context())
    limits = Limits(0, halves=method == "tome")
    for length in (11, 16, 23, 64):
        wanted, tokens = [], length
        for printed in result.details["schedule"]:
            if printed:
                tokens = parse(printed).of(tokens, limits)
                wanted.append(tokens)
        assert counts_of(result.program, length) == wanted


@pytest.mark.parametrize("program", [STATIC, DYNAMIC], ids=["fixed", "dynamic"])
def test_a_share_for_each_block(program: Program) -> None:
    result = TopkNorm(TokenOptions(keep=(0.75, 1.0, 0.5)))(program, Context())
    assert result.details["schedule"] == ["0.75", "", "0.5"]
    length, prefix = (32, 1) if program is STATIC else (64, 0)
    left = [ceil(share * length) + prefix for share in (0.75, 0.375)]
    assert counts_of(result.program, length) == left


@given(r=st.floats(0, 40), inflect=st.floats(-1, 1), sites=st.integers(1, 24))
def test_a_sloped_share_out_is_whole_numbers_along_a_straight_line(
    r: float, inflect: float, sites: int
) -> None:
    """Any stretch of sites loses what the line says, to within one token at either end."""
    found = spread(r, inflect, sites)
    assert min(found) >= 0
    slope = 2 * inflect * r / (sites - 1) if sites > 1 else 0
    line = [r - slope * (sites - 1) / 2 + slope * i for i in range(sites)]
    for end in range(sites + 1):
        assert abs(sum(found[:end]) - sum(line[:end])) < 1 + 1e-6


@pytest.mark.parametrize("inflect", [-1, -0.5, 0.5, 1])
def test_a_flops_budget_follows_the_slope(inflect: float) -> None:
    result = Tome(TomeOptions(flops=0.88, inflect=inflect))(STATIC, Context())
    tokens = result.details["tokens"]
    gone = [a - b for a, b in pairwise(tokens)]
    assert gone == sorted(gone, reverse=inflect < 0)
    assert gone[0] != gone[-1]
    assert 0.84 <= result.details["macs"] / result.details["dense_macs"] <= 0.88


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": (0.9, 0.8)}, "keep has 2 entries and the model has 3 sites"),
        ({"keep": (0.9, 0.8, 0.7), "layers": (1,)}, "keep has one share per block and layers"),
        ({"keep": (0.9, 0.4, 0.7)}, "keep=0.4 is too little: merging in pairs"),
    ],
)
def test_shares_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Tome(TomeOptions(**options)).plan(STATIC)


def test_a_slope_needs_numbers_of_tokens() -> None:
    with pytest.raises(UsageError, match="inflect shapes numbers of tokens"):
        Evit(EvitOptions(flops=0.8, inflect=-1)).plan(STATIC)


def test_a_list_that_is_not_monotone_is_clamped_and_emits_nothing_where_nothing_changes() -> None:
    given = DiffRateOptions(prune=(33, 28, 30), counts=(33, 26, 29))
    result = DiffRate(given)(STATIC, Context())
    assert result.details["tokens"] == [33, 33, 26, 26]
    assert result.details["schedule"] == ["", "=28>26", ""]
    assert result.applied == 1
    emitted = [n for n in result.program.graph.nodes if "prune_merge" in str(n.target)]
    assert [node.args[3:] for node in emitted] == [(28, 26, 1)]


def test_no_pruning_without_counts_and_as_many_entries() -> None:
    for wrong in ({"prune": (9, 9)}, {"prune": (9, 9), "counts": (9,)}, {"prune": (9,), "r": 1}):
        with pytest.raises(ValueError, match="prune has one entry for each of counts"):
            DiffRateOptions(**wrong)


def test_counts_that_leave_no_token_are_refused_by_block() -> None:
    options = DiffRateOptions(prune=(33, 20, 1), counts=(33, 20, 1))
    with pytest.raises(UsageError, match=r"counts\[2\]=1>1 is too little: .* at least 2 there"):
        DiffRate(options).run(STATIC, Context())


def test_without_a_class_token_tokens_merge_only() -> None:
    program = traced(Toy(Block(), Block(), pool="mean"), tokens=12)
    result = DiffRate(DiffRateOptions(r=3))(program, Context())
    assert [entry.combine for entry in result.program.ledger] == ["merge", "merge"]
    for token_map in token_maps(result.program, {"x": torch.randn(2, 12, WIDTH)}):
        assert (token_map.slot >= 0).all()


def test_half_is_pruned_and_half_merged_by_default() -> None:
    result = DiffRate(DiffRateOptions(r=5, layers=(0,)))(STATIC, Context())
    (token_map,) = token_maps(result.program, {"x": torch.randn(2, 32, WIDTH)})
    assert token_map.entry.combine == "drop and merge"
    assert ((token_map.slot < 0).sum(1) == 2).all()
    assert token_map.kept.shape[1] == 28
