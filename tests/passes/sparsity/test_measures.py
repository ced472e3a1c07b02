"""CETT, unions, quantiles, criteria and the arithmetic of what pays, against float64 written out."""

from __future__ import annotations

from functools import partial
from math import exp, log, sin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.sparsity.toys import Causal, labelled, noise, sentences, toy
from thresher.compiler.contract import Context
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.passes.sparsity import criterion, payoff
from thresher.passes.sparsity.cett import Cett, Union
from thresher.passes.sparsity.moments import Moments
from thresher.passes.sparsity.quantiles import Mode, Quantiles
from thresher.passes.sparsity.report import report

ROWS = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)).pow(3)
LARGE = (4096, 11008)
WEIGHT = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))


def streamed(collector: object) -> None:
    """The rows in uneven pieces, with a save and a restore in between."""
    for piece in (ROWS[:7], ROWS[7:200]):
        collector.add(piece)  # type: ignore[attr-defined]
    collector.restore(collector.state())  # type: ignore[attr-defined]
    collector.add(ROWS[200:])  # type: ignore[attr-defined]


def cett(eps: float) -> tuple[float, float]:
    """CETT and sparsity by the definition."""
    rows, weight = ROWS.double(), WEIGHT.double()
    parts = rows[:, None, :] * weight[None]  # [T, O, H]: what each neuron contributes
    small = parts.norm(dim=1) < eps
    lost = (parts * small[:, None]).sum(-1).norm(dim=1)
    return float((lost / parts.sum(-1).norm(dim=1)).mean()), float(small.double().mean())


def test_cett_is_that_of_the_definition() -> None:
    table = Cett(WEIGHT)
    streamed(table)
    curve = table.curve()
    highest = 0.0
    for eps, found, sparsity in zip(curve.eps, curve.cett, curve.sparsity, strict=True):
        value, share = cett(float(eps))
        highest = max(highest, value)
        assert found == pytest.approx(highest, rel=1e-4, abs=1e-6)
        assert sparsity == pytest.approx(share, abs=2e-4)
    assert (curve.cett[1:] >= curve.cett[:-1]).all()
    assert curve.cett[-1] == pytest.approx(max(1.0, highest), rel=1e-4)


@pytest.mark.parametrize("wanted", [0.01, 0.1, 0.3, 0.7])
def test_a_threshold_reaches_its_cett(wanted: float) -> None:
    table = Cett(WEIGHT)
    streamed(table)
    assert cett(table.curve().threshold(wanted))[0] == pytest.approx(wanted, abs=0.02)
    assert cett(table.curve().sparse(wanted))[1] == pytest.approx(wanted, abs=0.02)


def test_no_cett_no_threshold() -> None:
    table = Cett(WEIGHT)
    streamed(table)
    assert table.curve().threshold(0.0) == 0.0
    assert table.exact_zeros == 0.0
    table.add(torch.zeros(300, 24))
    assert table.exact_zeros == 0.5


def test_unions_are_those_of_neighbours() -> None:
    threshold = torch.full((24,), 0.5)
    union = Union(threshold, (1, 4, 64))
    union.add(ROWS)
    active = ROWS.abs() > 0.5
    want = {m: active[: 300 // m * m].view(-1, m, 24).any(1).double().mean() for m in (1, 4, 64)}
    assert union.shares() == pytest.approx({m: float(v) for m, v in want.items()})
    assert sorted(union.shares().values()) == list(union.shares().values())


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scaled", [False, True])
def test_quantiles_are_exact_to_a_bin(share: float, scaled: bool) -> None:
    scale = WEIGHT.norm(dim=0) if scaled else None
    sums = Quantiles(scale, shift=0.25)
    streamed(sums)
    sizes = (ROWS - 0.25).abs() * (1.0 if scale is None else scale)
    assert (sizes <= sums.at(share)).double().mean() == pytest.approx(share, abs=3e-3)


def test_the_mode_is_where_values_crowd() -> None:
    mode = Mode()
    mode.add(torch.cat([torch.randn(4000) * 3, torch.randn(4000) * 0.01 - 0.17])[:, None])
    assert mode.value() == pytest.approx(-0.17, abs=0.02)


def test_moments() -> None:
    sums = Moments(24)
    streamed(sums)
    rows = ROWS.double()
    want = {
        "mean": rows.mean(0),
        "variance": rows.var(0, correction=0),
        "magnitude": rows.abs().mean(0),
    }
    for name, value in sums.tensors().items():
        torch.testing.assert_close(value, want[name].float(), rtol=1e-6, atol=1e-7)


# --- the search for a rise ------------------------------------------------------------------------


@given(scale=st.floats(0.05, 50), power=st.floats(0.8, 4), p=st.floats(0.002, 0.3))
def test_the_search_hits_the_rise(scale: float, power: float, p: float) -> None:
    def rise(c: float) -> float:
        return exp(scale * c**power) - 1

    c, reached = criterion.largest(rise, p)
    assert reached == rise(c)
    if rise(1.0) > p + criterion.TOLERANCE:
        assert abs(reached - p) <= criterion.TOLERANCE
    else:
        assert c == 1.0


def test_a_smooth_rise_takes_few_runs_and_searches_share_them() -> None:
    runs: list[float] = []

    def rise(c: float) -> float:
        runs.append(c)
        return exp(6 * c * c) - 1 - 0.003 * sin(20 * c)

    known: dict[float, float] = {}
    for p in (0.01, 0.05, 0.1):
        _, reached = criterion.largest(rise, p, known=known)
        assert abs(reached - p) <= criterion.TOLERANCE
    assert len(runs) <= 15  # halving takes 23
    assert len(runs) == len(set(runs)) == len(known)


def test_what_rises_in_steps_stays_below() -> None:
    c, reached = criterion.largest(lambda c: 0.0 if c < 0.3 else 0.4, 0.1)
    assert c == pytest.approx(0.3, abs=1e-6)
    assert reached == 0.0


def test_what_is_lost_at_zero_is_told() -> None:
    assert criterion.largest(lambda c: 0.02 + c, 0.01) == (0.0, 0.02)


def causal() -> Program:
    torch.manual_seed(0)
    example = {"input_ids": torch.zeros(2, 12, dtype=torch.int64)}
    dynamic = {"input_ids": {0: "batch"}}
    return trace(Causal(), example, dynamic=dynamic, info=SourceInfo("toy"))


def test_perplexity_is_that_of_the_next_word() -> None:
    program = causal()
    judged = criterion.choose(program, sentences())
    assert judged.kind == "perplexity"
    ids = torch.from_numpy(sentences().take(range(16))[0]["input_ids"])
    logits = program.run({"input_ids": ids})["logits"]
    total, count = judged.loss({"logits": logits}, {}, None, {"input_ids": ids})
    chances = logits.double().softmax(-1)
    want = [-log(chances[b, n, ids[b, n + 1]]) for b in range(16) for n in range(11)]
    assert total == pytest.approx(sum(want))
    assert count == len(want)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    total, count = judged.loss(
        {"logits": logits}, {}, None, {"input_ids": ids, "attention_mask": mask}
    )
    want = [-log(chances[b, n, ids[b, n + 1]]) for b in range(16) for n in range(4)]
    assert total == pytest.approx(sum(want))
    assert count == len(want)


def test_without_answers_it_is_the_error_of_the_outputs() -> None:
    judged = criterion.choose(toy("plain"), labelled())
    assert judged.kind == "error"
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    total, count = judged.loss({"output": a}, {"output": b}, None, {})
    assert total / count == pytest.approx(float(((a - b).norm(dim=1) / b.norm(dim=1)).mean()))


# --- what pays ------------------------------------------------------------------------------------


def test_factors() -> None:
    assert payoff.factor("cpu", 4, 1 - 0.9**4, *LARGE) == pytest.approx(2.3)
    assert payoff.factor("cpu", 197, 0.01, *LARGE) == 1.0
    narrow = partial(payoff.factor, weights="bfloat16")
    assert narrow("cpu", 1, 1.0, *LARGE) == pytest.approx(1.9)  # half the bytes
    assert narrow("cpu", 4, 0.5, *LARGE) == payoff.factor("cpu", 4, 0.5, *LARGE)
    assert payoff.factor("openvino", 1, 0.1, *LARGE) < 1
    half, tenth = (dict.fromkeys((1, 64), active) for active in (0.5, 0.1))
    verdict = payoff.verdict(
        "cpu", 1, {"a": payoff.Part(0.3, half, *LARGE), "b": payoff.Part(0.3, tenth, *LARGE)}
    )
    k, more = (payoff.factor("cpu", 1, active, *LARGE) for active in (0.5, 0.1))
    assert verdict.gain == pytest.approx(1 / (0.4 + 0.3 / k + 0.3 / more))
    assert verdict.pays
    assert not payoff.verdict("cpu", 197, {"a": payoff.Part(0.3, tenth, *LARGE)}).pays


@pytest.mark.parametrize(
    ("inputs", "outputs", "measured"),  # at 0.5 and 0.7, see docs/benchmarks.md
    [
        (576, 576, (1.72, 2.31)),
        (576, 960, (1.97, 2.63)),
        (1536, 576, (1.83, 2.78)),
        (576, 3072, (2.22, 3.37)),
        (768, 3072, (1.99, 3.23)),
        (4096, 11008, (2.17, 3.55)),
    ],
)
def test_a_step_is_worth_what_was_measured(
    inputs: int, outputs: int, measured: tuple[float, float]
) -> None:
    for skipped, k in zip((0.5, 0.7), measured, strict=True):
        assert payoff.factor("cpu", 1, 1 - skipped, inputs, outputs) == pytest.approx(k, rel=0.15)


def test_calls_cost_more_than_tiny_matrices() -> None:
    """The more so, the smaller they are; nothing skipped is never a gain there."""
    ks = [payoff.factor("cpu", 1, 0.1, size, size) for size in (16, 128, 512, 4096)]
    assert ks == sorted(ks)
    assert ks[0] < 1 < ks[-1]


# --- the report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_the_report_holds_what_it_says(kind: str) -> None:
    found = report(toy(kind), Context(data=noise(40), batch=8), items=20)
    assert [p.asked for p in found.points] == [1.0, 5.0, 10.0]
    for point in found.points:
        assert point.met or point.reached < point.asked  # a toy's loss rises in steps
    assert sum(point.met for point in found.points) >= 2
    (layer,) = found.layers
    shares = list(layer.sparsity.values())
    assert shares == sorted(shares)
    assert layer.union[1] == pytest.approx(1 - layer.sparsity[1.0], abs=0.05)
    assert list(layer.union.values()) == sorted(layer.union.values())
    assert not any(v.pays for v in found.verdicts)  # ten tokens at once


def test_what_cannot_be_reported() -> None:
    with pytest.raises(RefusedError, match=r"cannot be measured: .* normalises over the neurons"):
        report(toy("normed"), Context(data=noise()))
    with pytest.raises(UsageError, match="calibration needs at least 16"):
        report(toy("plain"), Context(data=noise(9)))
    with pytest.raises(
        UsageError, match="of which 8 are asked for, and calibration needs at least 16: ask"
    ):
        report(toy("plain"), Context(data=noise(40)), items=4)


def test_padding_is_left_out() -> None:
    from thresher.passes.learning.tap import Tapped

    tapped = Tapped(toy("plain"))
    tapped._alive = torch.tensor([[True, False], [True, True]])
    value = torch.arange(12.0).view(2, 2, 3)
    rows: Tensor = tapped.rows(value)
    assert rows.tolist() == [[0, 1, 2], [6, 7, 8], [9, 10, 11]]
