"""Inverse transform sampling by its definition, one quantile at a time in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.compiler.contract import Context
from thresher.compiler.ledger import token_maps
from thresher.models.sources import load_source
from thresher.passes.tokens.ats import Ats, AtsOptions, sampled

FAST = settings(max_examples=60, deadline=None, derandomize=True)


@FAST
@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 6), min_size=n, max_size=n).filter(any), min_size=1, max_size=3
        )
    ),
    points=st.integers(1, 8),
)
def test_quantiles_take_the_token_nearest_in_cumulative_share(
    rows: list[list[int]], points: int
) -> None:
    # Totals are powers of two, so shares and sums are exact and ties are ties.
    rows = [[*row, 128 - sum(row)] for row in rows]
    share = torch.tensor(rows, dtype=torch.float64) / 128
    found = sampled(share, points)
    for row, taken in zip(rows, found.tolist(), strict=True):
        wanted = set()
        for k in range(1, points + 1):
            quantile = Fraction(2 * k - 1, 2 * points)
            heights = {i: Fraction(sum(row[: i + 1]), 128) for i, n in enumerate(row) if n}
            wanted.add(min(heights, key=lambda i: (abs(heights[i] - quantile), i)))
        assert {i for i, yes in enumerate(taken) if yes} == wanted


def test_one_share_takes_every_sample_and_equal_ones_go_by_index() -> None:
    assert sampled(torch.eye(5)[2:3], 4).tolist() == [[False, False, True, False, False]]
    # every quantile but the first lies in the middle of two tokens, and takes the first of them
    assert sampled(torch.full((1, 8), 1 / 8), 8).tolist() == [[True] * 7 + [False]]


def test_what_an_image_keeps_does_not_depend_on_its_neighbours() -> None:
    program = load_source("tests.cli.toy:vit")
    reduced = Ats(AtsOptions(keep=0.6, capped=True))(program, Context()).program
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    together = reduced.run({"x": 3 * images})
    for index in range(3):
        alone = reduced.run({"x": 3 * images[index : index + 1]})
        for name, value in alone.items():
            torch.testing.assert_close(value, together[name][index : index + 1])


def test_a_count_is_a_count_and_a_cap_leaves_places_empty() -> None:
    program = load_source("tests.cli.toy:vit")
    images = 10 * torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    fixed = Ats(AtsOptions(keep=0.9, layers=(0,)))(program, Context()).program
    capped = Ats(AtsOptions(keep=0.9, layers=(0,), capped=True))(program, Context()).program
    (a,), (b,) = (token_maps(p, {"x": images}) for p in (fixed, capped))
    assert a.kept.tolist() == b.kept.tolist()  # the places are the same, some of them empty
    full, sparse = (next(iter(p.run({"x": images}).values())) for p in (fixed, capped))
    assert not torch.allclose(full, sparse)
