"""ATM: counts and outputs by a plain loop in float64, what pairs are, budgets, and what is kept."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thresher.kernels.ops  # noqa: F401
from tests.compiler.lowered import error, on_onnxruntime, proto
from tests.compiler.toys import HEADS, TOKENS, WIDTH, Block, Toy, traced
from tests.families.decisions import Step, merge, merge_by_size
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.recipe import parse_recipe
from thresher.compiler.trace import trace
from thresher.models.data import Dataset
from thresher.passes.tokens.atm import Atm, AtmOptions, Found, MergeBySize, within

FAST = settings(max_examples=60, deadline=None, derandomize=True)
LAYERS, ITEMS, MANY = 3, 12, 24
SIZES_IN_FLOAT32 = 3e-6  # relative


@cache
def model(pool: str = "class", dtype: torch.dtype = torch.float64) -> Toy:
    torch.manual_seed(5)
    made = Toy(*(Block() for _ in range(LAYERS)), pool=pool).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
    return made.eval()


@cache
def program(pool: str = "class") -> Program:
    example = {"x": torch.zeros(2, MANY, WIDTH, dtype=torch.float64)}
    return trace(model(pool), example, dynamic={"x": {0: "batch"}}, info=SourceInfo("toy"))


@cache
def items() -> np.ndarray[Any, Any]:
    """Tokens near a few directions, so that many pairs are alike."""
    rng = np.random.default_rng(1)
    middles = rng.standard_normal((ITEMS, 5, WIDTH))
    which = rng.integers(0, 5, (ITEMS, MANY))
    near = np.take_along_axis(middles, which[..., None], 1)
    return near + 0.4 * rng.standard_normal((ITEMS, MANY, WIDTH))


def data(values: np.ndarray[Any, Any] | None = None) -> Dataset:
    x = items() if values is None else values
    return Dataset("clusters", len(x), None, lambda chosen: {"x": x[list(chosen)]})


def run(subject: Program, context: Context | None = None, **options: Any) -> PassResult:
    return Atm(AtmOptions(**options))(subject, context or Context(data=data(), batch=5))


def kept(result: PassResult) -> AtmOptions:
    """What asks for the same without data."""
    assert isinstance(result.options, AtmOptions)
    return result.options


def by_hand(pool: str, alpha: float, beta: float, least: float, first: int) -> tuple[Any, Tensor]:
    """Counts and logits: every item alone but for the mean number of pairs, tokens as lists."""
    made, prefix = model(pool), int(pool == "class")
    tokens = [torch.cat([made.cls_token[0], x]) if prefix else x for x in torch.from_numpy(items())]
    sizes = [[1.0] * len(x) for x in tokens]
    counts = []
    for layer, block in enumerate(made.blocks):
        assert isinstance(block, Block)
        threshold = max(alpha - (math.exp(beta * layer) - 1), least)
        join = merge_by_size if layer >= first else merge
        attended = [attend(block, x, s) for x, s in zip(tokens, sizes, strict=True)]
        pairs = []
        for (_, key), size in zip(attended, sizes, strict=True):
            likeness: dict[int, float] = {}
            join(range(len(key)), key, size, prefix, 0, likeness)
            pairs.append(sum(value > threshold for value in likeness.values()))
        gone = sum(pairs) // len(pairs)
        for at, ((x, key), size) in enumerate(zip(attended, sizes, strict=True)):
            step = join(range(len(key)), key, size, prefix, gone)
            order = step.sequence if layer >= first else in_parity_order(step, prefix)
            groups = [[n, *(s for s, t in step.merged.items() if t == n)] for n in order]
            sizes[at] = [sum(size[n] for n in group) for group in groups]
            x = torch.stack([mean_of(x, size, group) for group in groups])
            tokens[at] = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        counts.append(len(tokens[0]))
    read = []
    for x, size in zip(tokens, sizes, strict=True):
        weight = torch.tensor(size, dtype=torch.float64)[:, None]
        normed = made.norm(x)
        read.append(made.head(normed[0] if prefix else (weight * normed).sum(0) / weight.sum()))
    return tuple(counts), torch.stack(read)


def mean_of(x: Tensor, size: list[float], group: list[int]) -> Tensor:
    weight = torch.tensor([size[n] for n in group], dtype=torch.float64)
    return (weight[:, None] * x[group]).sum(0) / weight.sum()


def in_parity_order(step: Step, prefix: int) -> list[int]:
    """Without a prefix the loops order kept sources by likeness, and ATM by index."""
    even = [n for n in step.sequence[prefix:] if n % 2 == 0]
    return [*step.sequence[:prefix], *sorted(even), *(n for n in step.sequence[prefix:] if n % 2)]


def attend(block: Block, x: Tensor, size: list[float]) -> tuple[Tensor, Tensor]:
    """The stream behind the attention of one item ``[N, C]``, and the mean keys ``[N, d]``."""
    q, k, v = block.qkv(block.norm1(x)).reshape(len(x), 3, HEADS, -1).unbind(1)
    log_size = torch.tensor(size, dtype=torch.float64).log()
    logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1]) + log_size
    y = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v).flatten(1)
    return x + block.proj(y), k.mean(1)


@pytest.mark.parametrize(
    ("pool", "first"),
    [
        ("class", 2), ("mean", 0),
        *(pytest.param("class", first, marks=pytest.mark.slow) for first in (0, 9)),
        *(pytest.param("mean", first, marks=pytest.mark.slow) for first in (2, 9)),
    ],
)  # fmt: skip
def test_counts_and_outputs_are_those_of_a_plain_loop(pool: str, first: int) -> None:
    asked: dict[str, Any] = {"alpha": 0.95, "beta": 0.05, "least": 0.85}
    with torch.no_grad():
        counts, wanted = by_hand(pool, first=first, **asked)
    result = run(program(pool), by_size=first, **asked)
    assert kept(result).counts == counts
    assert len(set(counts)) > 2
    (found,) = result.program.run({"x": torch.from_numpy(items())}).values()
    assert float((found - wanted).abs().max() / wanted.abs().max()) < SIZES_IN_FLOAT32


@FAST
@given(
    seed=st.integers(0, 2**31), batch=st.integers(1, 3), tokens=st.integers(1, 12),
    protected=st.sampled_from((0, 1, 2, 5)), by_size=st.booleans(), padding=st.booleans(),
)  # fmt: skip
def test_pairs_are_sources_with_their_best_targets(
    seed: int, batch: int, tokens: int, protected: int, by_size: bool, padding: bool
) -> None:
    rng = np.random.default_rng(seed)
    tokens += protected
    metric = torch.from_numpy(rng.standard_normal((batch, 2, tokens, 3)))
    size = torch.from_numpy(rng.integers(0 if padding else 1, 4, (batch, tokens)).astype("f4"))
    found = MergeBySize(True, first=0 if by_size else 1).pairs(0, metric, size, protected)
    for b in range(batch):
        likeness: dict[int, float] = {}
        join = merge_by_size if by_size else merge
        sizes = size[b].tolist()
        join(range(tokens), metric[b].mean(0), sizes, protected, 0, likeness)
        real = any(sizes[n] for n in range(protected, tokens) if n not in likeness)
        wanted = [value for n, value in likeness.items() if sizes[n] and real]
        got = [value for value in found[b].tolist() if value >= -1.5]
        assert sorted(got) == pytest.approx(sorted(wanted), abs=1e-12)


@cache
def budgeted() -> PassResult:
    return run(program(), flops=0.6)


def test_a_budget_is_met_by_the_strictest_thresholds_that_do() -> None:
    result = budgeted()
    assert 0.55 < result.details["macs"] / result.details["dense_macs"] <= 0.6
    alpha = result.details["alpha"]
    assert f"a cosine of {alpha:.3f}" in result.details["note"]
    stricter = run(program(), alpha=alpha + 0.05)
    assert stricter.details.get("macs", math.inf) > result.details["macs"]
    assert run(program(), alpha=alpha).options == result.options


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_the_step_where_a_budget_is_met(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.uniform(0, 1, rng.integers(1, 30)))
    tried = []

    def found(alpha: float) -> Found:
        tried.append(alpha)
        return Found(alpha, (), 0.2 + 0.8 * float((steps < alpha).mean()))

    target = rng.uniform(0.2, 0.99)
    best = within(found, target, 0.0, 1.1)
    assert best.share <= target
    assert len(tried) <= 15
    better = min((found(a).share for a in [*(steps + 1e-9), 0.0] if found(a).share <= target),
        key=lambda share: target - share)  # fmt: skip
    assert better - best.share <= 0.8 / len(steps) + 1e-9  # at most the next step is missed


def test_what_was_counted_needs_no_data_again() -> None:
    first = budgeted()
    second = Atm(kept(first))(program(), Context())
    assert second.options is None  # nothing was decided
    assert str(second.program.graph) == str(first.program.graph)


def test_an_items_answer_does_not_depend_on_its_neighbours() -> None:
    reduced = budgeted().program
    x = torch.from_numpy(items())
    (together,) = reduced.run({"x": x}).values()
    for index in range(3):
        (alone,) = reduced.run({"x": x[index : index + 1]}).values()
        torch.testing.assert_close(alone, together[index : index + 1])


@pytest.mark.slow
def test_lengths_that_differ_are_counted_in_shares() -> None:
    toy = traced(model("mean", torch.float32), dynamic=True)
    context = Context(data=data(items().astype(np.float32)), batch=5)
    result = run(toy, context, alpha=0.9)
    shares = kept(result).keep
    assert isinstance(shares, tuple)
    assert len(shares) == LAYERS
    assert all(0.5 <= share <= 1 for share in shares)
    assert min(shares) < 1
    again = Atm(kept(result))(toy, Context()).program
    assert str(again.graph) == str(result.program.graph)
    for length in (TOKENS, MANY):
        assert again.run({"x": torch.randn(3, length, WIDTH)})


def test_only_the_blocks_that_are_named_merge_and_counts_are_rounded() -> None:
    result = run(program(), alpha=0.9, layers=(1,), multiple=4)
    tokens = result.details["tokens"]
    assert tokens[0] == tokens[1] > tokens[2] == tokens[3]
    assert tokens[2] % 4 == 0


def test_the_reduced_graph_is_the_same_in_onnxruntime() -> None:
    float32 = traced(model(dtype=torch.float32), MANY)
    x = items().astype(np.float32)
    result = run(float32, Context(data=data(x), batch=5), alpha=0.9, by_size=1)
    assert any("split_merge" in str(node.target) for node in result.program.graph.nodes)
    feeds = {"x": torch.from_numpy(x)}
    assert error(on_onnxruntime(proto(result.program), feeds), result.program, feeds) < 1e-5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alpha": 0.9, "flops": 0.5}, "give one budget only, not alpha and flops"),
        ({"alpha": 0.9, "counts": (1,)}, "give one budget only, not alpha and counts"),
        ({"flops": 0.9, "inflect": 1.0}, "inflect goes with r"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AtmOptions(**given)


def test_refusals() -> None:
    nothing = run(program(), alpha=1.5, beta=0.0)
    assert (nothing.applied, nothing.program) == (0, program())
    assert "no pair of tokens has a cosine above 1.5: lower alpha" in nothing.refused[0].reason
    with pytest.raises(UsageError, match="pass 'atm' needs data and none was given"):
        run(program(), Context(), flops=0.5)
    with pytest.raises(VerdictError, match=r"every pair above a cosine of 0\.99 merged"):
        within(lambda alpha: Found(alpha, (), 0.9), 0.5, 0.99, 1.1)
    for budget in ({"r": 2}, {"keep": 0.8}, {"counts": (20, 18, 16)}):
        assert run(program(), Context(), **budget).applied  # counts that are given take no data


def test_a_pass_that_is_asked_says_what_it_would_do() -> None:
    atm, context = Atm(AtmOptions(alpha=0.9)), Context(data=data(), batch=5)
    told = atm.explain(program(), context)
    assert told.program is program()
    assert told.details.items() <= atm(program(), context).details.items()
    assert "needs data" in atm.explain(program(), Context()).refused[0].reason


def test_a_recipe_with_data_leaves_its_counts_in_the_history() -> None:
    recipe = parse_recipe("name: r\npasses:\n  - atm: {alpha: 0.9}\n", "r.yaml")
    reduced = optimize(program(), recipe, Context(data=data(), batch=5))
    record = reduced.history[-1]
    assert "counts" in record.options
    assert record.options.get("alpha") is None
