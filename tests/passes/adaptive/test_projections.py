"""Linears of attention as modules: found, exact at full rank, best at less, trained, kept and refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from tests.passes.adaptive.test_acm import STEPS, context, convert, dense, inputs, noise
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.lowering.onnx_export import to_onnx
from thresher.compiler.program import Program, stored_tensors
from thresher.passes.adaptive.acm import Acm
from thresher.passes.adaptive.insert import insert
from thresher.passes.adaptive.job import AcmOptions, Job
from thresher.passes.adaptive.projections import projections, unfused
from thresher.passes.adaptive.start import LOOKED_AT, Principal
from thresher.passes.adaptive.train import _Training
from thresher.passes.learning.batches import HELD_OUT, LEAST_ITEMS

ALL = ("ffn", "qkv", "out")
IDENTITY = "AdaptiveMLP_4_identity"


class Separate(Block):
    """Three linears; keys and values of half the width where heads share them."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.group = 2 if shared else 1
        narrow = WIDTH // self.group
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, narrow)
        self.v = nn.Linear(WIDTH, narrow)

    def forward(self, x: Tensor) -> Tensor:
        y, shape = self.norm1(x), (*x.shape[:2], -1, WIDTH // 2)
        q, k, v = (linear(y).reshape(shape).transpose(1, 2) for linear in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        mixed: Tensor = x + self.proj(y)
        return mixed


def training(program: Program, rank: float, learners: int = 4, **options: Any) -> _Training:
    """Of all linears of attention; nothing is trained yet."""
    whole = unfused(program, ("qkv", "out"), "acm")
    sites, _ = projections(whole, ("qkv", "out"), learners, rank, 0)
    chosen = AcmOptions(**{**STEPS, "learners": learners, "rank": rank, **options})
    return _Training(Job(whole, sites, chosen, context()))


def everything(started: _Training) -> Program:
    """The graph of modules whose every token runs every learner."""
    with torch.no_grad():
        for module in started.modules:
            module.gate_bias[-1] = 1e3
    shares = [1.0] * len(started.modules)
    exported = insert(started.job.program, started.job.sites, started.modules, shares, "acm")
    return replace(started.job.program, exported=exported)


@cache
def separate() -> Program:
    torch.manual_seed(1)
    return traced(Toy(Separate(), Block()))


def test_one_linear_cut_in_three_computes_the_same() -> None:
    cut = unfused(dense(), ("qkv",), "acm")
    torch.testing.assert_close(cut.run(inputs()), dense().run(inputs()))
    assert total_macs(cut.graph) == total_macs(dense().graph)
    assert unfused(cut, ("qkv", "out"), "acm") is cut
    sites, refusals = projections(cut, ("qkv", "out"), 4, 0.5, 0)
    names = [
        f"blocks.{b}.{linear}" for b in (0, 1) for linear in ("qkv[0]", "qkv[1]", "qkv[2]", "proj")
    ]
    assert ([site.path for site in sites], refusals) == (names, [])


@pytest.mark.parametrize("learners", [1, 4])
@pytest.mark.parametrize("model", [dense, separate])
def test_all_learners_of_full_rank_are_the_dense_model(model: Any, learners: int) -> None:
    started = training(model(), 1.0, learners)
    assert started.kept == pytest.approx([1.0] * len(started.kept), abs=1e-9)
    found, expected = everything(started).run(inputs()), model().run(inputs())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_learners_begin_as_the_best_map_of_their_rank() -> None:
    """Against a singular value decomposition of the results on the batches that were looked at."""
    started = training(dense(), 0.5)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for step in range(LOOKED_AT):
        for index, pair in started.forward.watched(started.batches.at(step)[0]).items():
            seen.setdefault(index, []).append(pair)
    for index, module in enumerate(started.modules):
        x, y = (torch.cat(part) for part in zip(*seen[index], strict=True))
        results = y.double().numpy()
        mean = results.mean(0)
        left, sizes, right = np.linalg.svd(results - mean, full_matrices=False)
        with torch.no_grad():
            prefixes = module.prefixes(x).double().numpy()
        for n in range(5):
            best = mean + (left[:, : 2 * n] * sizes[: 2 * n]) @ right[: 2 * n]
            np.testing.assert_allclose(prefixes[n], best, atol=1e-4)
        energy = (sizes[:8] ** 2).sum() / (sizes**2).sum()
        assert started.kept[index] == pytest.approx(energy, abs=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31), st.sampled_from([(1, 1), (2, 2), (2, 6), (3, 6), (1, 5)]), st.booleans()
)
def test_more_learners_are_never_worse(seed: int, sizes: tuple[int, int], flat: bool) -> None:
    """Also where results lie on a plane, and with one batch much larger than the others."""
    (learners, rank), width, generator = sizes, 6, torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, bias = drawn(width, width), drawn(width)
    if flat:
        weight[:, 2:] = 0
    start, rows = Principal(weight, bias, rank, learners), []
    for _ in range(LOOKED_AT):
        x = drawn(12, width)
        start.see(x, x @ weight.T + bias)
        rows.append(x)
    module, kept = start.module()
    x = torch.cat(rows)
    y = x @ weight.T + bias
    with torch.no_grad():
        errors = (module.prefixes(x) - y).square().sum((1, 2))
    spread = (y - y.mean(0)).square().sum()
    assert (errors[1:] <= errors[:-1] + 1e-9 * spread).all()
    assert float(errors[0]) == pytest.approx(float(spread))
    assert float(errors[-1]) == pytest.approx(float((1 - kept) * spread), abs=1e-9 * float(spread))
    assert rank < (2 if flat else width) or kept == pytest.approx(1.0)


@cache
def converted() -> Program:
    return convert(dense(), budget=0.5, sites="[ffn,qkv,out]")


def test_the_report_states_rank_and_costs() -> None:
    made = converted()
    record = made.history[0]
    assert (record.matched, record.applied) == (10, 10)
    details = record.details
    assert {(one["rank"], one["of"]) for one in details["projections"].values()} == {(8, 16)}
    least = min(one["variance"] for one in details["projections"].values())
    assert 0.5 < least < 1
    said = "keep rank 8 of 16, and before the training at least {:.3f} of the variance"
    assert said.format(least) in details["note"]
    tokens, square = TOKENS + 1, WIDTH * WIDTH
    gates = 10 * tokens * WIDTH * 5
    shares = details["networks"]
    run = sum(
        share * (1 if path in details["projections"] else 4) for path, share in shares.items()
    )
    dense_sites = 2 * (4 + 4) * tokens * square
    expected = details["dense_macs"] - dense_sites + run * tokens * square + gates
    assert details["macs"] == total_macs(made.graph) == pytest.approx(expected, abs=10)


def test_only_the_sites_that_are_asked_for() -> None:
    made = convert(dense(), sites="[out]")
    assert set(made.history[0].details["networks"]) == {"blocks.0.proj", "blocks.1.proj"}
    assert (
        made.history[0].details["projections"].keys() == made.history[0].details["networks"].keys()
    )
    kept = [node for node in made.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert sum(len(node.args[1].meta["val"]) == 3 * WIDTH for node in kept) == 2


def test_a_second_run_finds_nothing() -> None:
    with pytest.raises(RefusedError, match=r"no linear of attention was found \(qkv, out\)"):
        convert(converted(), sites="[qkv,out]")


def options(**more: Any) -> AcmOptions:
    return AcmOptions(**{**STEPS, "sites": ALL, "budget": 0.5, **more})


def test_kept_modules_make_the_same_graph_and_serve_another_budget(tmp_path: Path) -> None:
    first = Acm(options())(dense(), context())
    assert first.calibration is not None
    first.calibration.write(tmp_path)
    file = tmp_path / first.calibration.file
    found = Acm(options(calibration=file))(dense(), Context())
    assert found.program.text() == first.program.text()
    ours, theirs = (stored_tensors(r.program.exported) for r in (found, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found.details["projections"] == first.details["projections"]
    many = replace(context(noise(labels=False, items=HELD_OUT * LEAST_ITEMS)), batch=64)
    leaner = Acm(options(calibration=file, budget=0.25))(dense(), many)
    error = 4 * (0.25 / (HELD_OUT * (TOKENS + 1) * 10 / 4)) ** 0.5  # networks are most of the work
    assert leaner.details["share"] == pytest.approx(0.25, rel=0.02, abs=error)
    for wrong, said in (
        ({"sites": ("ffn",)}, "sites=ffn,qkv,out and not sites=ffn"),
        ({"rank": 0.25}, "rank=0.5 and not rank=0.25"),
    ):
        with pytest.raises(UsageError, match=f"was made with {said}"):
            Acm(options(calibration=file, **wrong))(dense(), Context())


def test_what_cannot_be_converted_is_refused_by_name() -> None:
    program = traced(Toy(Separate(shared=True)))
    fits, refusals = projections(program, ("qkv", "out"), 4, 0.5, 3)
    assert [(site.layer, site.path) for site in fits] == [(3, "blocks.0.q"), (4, "blocks.0.proj")]
    why = "maps 16 values to 8, and learners keep the width"
    assert [r.reason for r in refusals] == [f"blocks.0.{name} {why}" for name in ("k", "v")]
    with pytest.raises(
        RefusedError, match="keeps rank 1 of 16, which 4 learners cannot share: set a"
    ):
        convert(dense(), sites="[qkv,out]", rank=0.1)


def test_the_lowered_model_is_the_program() -> None:
    import onnx_ir as ir
    import onnxruntime as ort

    made = converted()
    model = to_onnx(made)
    found = [node.op_type for node in model.graph if node.domain == "thresher"]
    assert found.count(IDENTITY) == 8
    blob = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(blob, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": inputs(4)["x"].numpy()})
    (expected,) = made.run(inputs(4)).values()
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
