"""Trained routers: the forward that trains them is the graph, and gradients tell them who should have run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.compiler.toys import TOKENS, WIDTH, Block
from tests.passes.adaptive.test_acm import Pressed, context, noise
from tests.passes.depth.test_drop_blocks import Kind, PostNorm, masked, model, program, x
from tests.passes.depth.test_skip_tokens import skipped
from thresher.compiler.analysis.branches import blocks, find_branches, halves
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program
from thresher.kernels.keep_tokens.reference import keep_tokens
from thresher.models.data import Dataset
from thresher.passes.depth.bypass import Bypass
from thresher.passes.depth.routed import RoutedForward, running
from thresher.passes.depth.skip_tokens import SkipOptions, SkipTokens
from thresher.passes.depth.spans import find_spans
from thresher.passes.depth.train import Skipping
from thresher.passes.tokens import budget

STEPS = 4


def run(given: Context | None = None, **options: Any) -> PassResult:
    chosen: dict[str, Any] = {"router": "trained", "steps": STEPS, "items": 8, **options}
    return SkipTokens(SkipOptions(**chosen))(classes(), given or context())


@cache
def classes() -> Program:
    """Four blocks that answer with classes."""
    made = program()
    return replace(made, info=replace(made.info, labels=("a", "b", "c", "d")))


@cache
def whole() -> PassResult:
    return run()


def skipping(dense: Program, part: str, layers: tuple[int, ...], share: float) -> Skipping:
    sites, branches = find_sites(dense), find_branches(dense)
    parts = blocks(branches)
    if part == "ffn":
        parts = [half for half in halves(branches) if half.branches[0].kind == "ffn"]
    spans, refused = find_spans(dense, sites, [p for p in parts if p.branches[0].layer in layers])
    assert (len(spans), refused) == (len(layers), [])
    return Skipping(dense, sites, spans, budget.share(share))


def routers(chosen: Skipping) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {s.part.name: torch.randn(WIDTH + 1, generator=generator) for s in chosen.spans}


def graph(chosen: Skipping, given: dict[str, Tensor]) -> Program:
    made = Bypass(
        chosen.program, chosen.sites, chosen.spans, chosen.count, given, "skip-tokens", 0
    ).run()[0]
    return replace(chosen.program, exported=made)


@pytest.mark.parametrize(
    ("kind", "pool", "part", "layers", "share"),
    [
        (Block, "class", "block", (1, 3), 0.5),
        (Block, "mean", "block", (0, 1, 2), 0.3),
        (PostNorm, "class", "block", (1, 2), 0.5),
        (Block, "dense", "ffn", (0, 1, 2, 3), 0.2),
    ],
)
def test_what_is_trained_is_what_runs(
    kind: Kind, pool: str, part: str, layers: tuple[int, ...], share: float
) -> None:
    chosen = skipping(program(kind, pool), part, layers, share)
    given = routers(chosen)
    forward = RoutedForward(chosen.program, chosen.sites, chosen.spans, chosen.count)
    found = forward.routed({"x": x(6)}, given, None)["output"]
    torch.testing.assert_close(found, graph(chosen, given).run({"x": x(6)})["output"])


def test_the_trained_forward_is_an_eager_model_that_skips() -> None:
    chosen = skipping(program(), "block", (1, 3), 0.5)
    given = routers(chosen)
    forward = RoutedForward(chosen.program, chosen.sites, chosen.spans, chosen.count)
    found = forward.routed({"x": x(5)}, given, None)["output"]
    probes = {int(name): router.double().numpy() for name, router in given.items()}
    torch.testing.assert_close(found, skipped(Block, x(5), probes, 6))


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_padding_trains_as_it_runs(share: float) -> None:
    """With room for fewer and for more than the four real tokens."""
    _, dense, inputs = masked()
    chosen = skipping(dense, "block", (0,), share)
    given = {name: router.requires_grad_() for name, router in routers(chosen).items()}
    forward = RoutedForward(dense, chosen.sites, chosen.spans, chosen.count)
    found = forward.routed(inputs, given, inputs["real"] > 0)["output"]
    fixed = {name: router.detach() for name, router in given.items()}
    torch.testing.assert_close(found, graph(chosen, fixed).run(inputs)["output"])
    torch.autograd.backward(found[:, :4].square().sum())
    (router,) = given.values()
    assert router.grad is not None
    assert bool(router.grad[:-1].any()) == (share == 0.3)  # nobody real skips where there is room
    assert router.grad.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(2, 12), protected=st.integers(0, 2), seed=st.integers(0, 999),
    tied=st.booleans(), data=st.data(),
)  # fmt: skip
def test_who_runs_and_what_the_gradient_is(
    tokens: int, protected: int, seed: int, tied: bool, data: st.DataObject
) -> None:
    """The choice is that of the operator; its gradient is that of sigmoid(score - t), by the formula."""
    protected = min(protected, tokens - 1)
    keep = data.draw(st.integers(protected + 1, tokens))
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    score = (score.round() if tied else score).requires_grad_()
    found = running(score, keep, protected)
    _, slot, _ = keep_tokens(torch.zeros(3, tokens, 1), score.detach(), keep, protected, False)
    assert torch.equal(found.detach(), (slot >= 0).double())
    weight = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    torch.autograd.backward((found * weight).sum())
    assert score.grad is not None
    for row in range(3):
        best = sorted(score[row, protected:].tolist(), reverse=True)
        count = keep - protected
        last, first = best[count - 1], best[min(count, len(best) - 1)]
        for token in range(tokens):
            chance = 1 / (1 + torch.exp((last + first) / 2 - score[row, token].detach()))
            want = float(weight[row, token] * chance * (1 - chance)) if token >= protected else 0.0
            assert float(score.grad[row, token]) == pytest.approx(want, abs=1e-12)


def test_the_gradient_of_a_router_is_the_gain_of_running() -> None:
    """By an eager model whose last feed-forward half is weighed by a number for each token."""
    chosen = skipping(program(pool="mean"), "ffn", (3,), 0.5)
    given = {name: router.requires_grad_() for name, router in routers(chosen).items()}
    forward = RoutedForward(chosen.program, chosen.sites, chosen.spans, chosen.count)
    target = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    found = forward.routed({"x": x(4)}, given, None)["output"]
    torch.autograd.backward((found - target).square().sum())
    (router,) = given.values()

    made = model(Block, "mean")
    eager: Any = made.blocks
    with torch.no_grad():
        y = x(4)
        *first, last = eager
        for block in first:
            y = block(y)
        q, k, v = last.qkv(last.norm1(y)).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        stream = y + last.proj(mixed)
        score = stream @ router[:-1] + router[-1]
        best = score.sort(1, descending=True).values
        runs = (score >= best[:, 4:5]).float()
        between = (best[:, 4:5] + best[:, 5:6]) / 2
        chance = (score - between).sigmoid()
    assert TOKENS == 9
    runs.requires_grad_()
    y = stream + runs[..., None] * last.fc2(F.gelu(last.fc1(last.norm2(stream))))
    torch.autograd.backward((made.head(made.norm(y).mean(1)) - target).square().sum())
    assert runs.grad is not None
    slope = runs.grad * chance * (1 - chance)
    assert router.grad is not None
    want = (slope[..., None] * stream).sum((0, 1))
    torch.testing.assert_close(router.grad[:-1], want, rtol=1e-4, atol=1e-5)
    made.zero_grad()


def test_every_router_is_trained_and_the_model_is_not() -> None:
    before = [p.clone() for p in model().parameters()]
    begun, done = run(steps=0), whole()
    assert (done.matched, done.applied) == (2, 2)
    assert begun.calibration is not None
    assert done.calibration is not None
    for part in ("router.1", "router.3"):
        assert not torch.allclose(begun.calibration.tensors[part], done.calibration.tensors[part])
    assert all(torch.equal(a, b) for a, b in zip(before, model().parameters(), strict=True))
    told = done.details["training"]
    assert (told["loss"], told["steps"]) == ("labels", STEPS)
    assert begun.details["training"]["held_out"][0] == told["held_out"][0]
    assert done.details["macs"] == run(router="probe").details["macs"]


def test_training_lowers_the_loss_on_items_held_out() -> None:
    details = run(context(noise(labels=False, items=160)), steps=60, layers=(0, 1, 2, 3)).details
    before, after = details["training"]["held_out"]
    assert after < before
    assert details["training"]["loss"] == "dense"


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(context(checkpoints=tmp_path, progress=Pressed(2)))
    seen: list[int] = []
    told = context(checkpoints=tmp_path, progress=lambda what, done, total: seen.append(done))
    again = run(told)
    assert seen[-2:] == [3, 4]
    assert again.details == whole().details
    kept, resumed = whole().calibration, again.calibration
    assert kept is not None
    assert resumed is not None
    for name, tensor in kept.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor)
    with pytest.raises(UsageError, match=r"another run \(rate was 0\.01 and is 0\.1\)"):
        run(context(checkpoints=tmp_path), rate=0.1)


def test_kept_routers_need_no_data_and_serve_other_capacities(tmp_path: Path) -> None:
    first = whole()
    assert first.calibration is not None
    assert first.options is not None
    first.calibration.write(tmp_path)
    known = {**first.options.model_dump(), "calibration": tmp_path / first.calibration.file}
    again = run(Context(), **known)
    torch.testing.assert_close(
        again.program.run({"x": x()}), first.program.run({"x": x()}), rtol=0, atol=0
    )
    assert run(Context(), **{**known, "capacity": 0.3}).details["running"] == [TOKENS + 1, 4]
    with pytest.raises(UsageError, match=r"made with router=trained and not router=probe"):
        run(Context(), **{**known, "router": "probe"})
    with pytest.raises(UsageError, match="holds nothing for 0"):
        run(Context(), **{**known, "layers": (0,)})


def test_explaining_trains_nothing() -> None:
    never = context(progress=lambda *told: pytest.fail("it trained"))
    one = SkipTokens(SkipOptions(router="trained"))
    told = one.explain(classes(), never)
    assert (told.matched, told.applied, told.program) == (2, 2, classes())
    assert told.details["macs"] == whole().details["macs"]


def test_mistakes() -> None:
    with pytest.raises(UsageError, match="needs data and none was given"):
        run(Context())
    with pytest.raises(UsageError, match="loss=labels needs class labels"):
        run(context(noise(labels=False)), loss="labels")
    with pytest.raises(UsageError, match="has 4 items and training needs at least 5"):
        run(context(noise(items=4)))


@pytest.mark.slow
def test_padding_leaves_the_training_as_it_is() -> None:
    """What stands in padded tokens does not matter."""
    _, dense, inputs = masked()
    found = []
    for value in (0.0, 3.0):
        filled = inputs["x"].masked_fill(inputs["real"][..., None] == 0, value)
        arrays = {"x": filled.numpy(), "real": inputs["real"].numpy()}
        data = Dataset("padded", 8, None, lambda c, a=arrays: {k: v[list(c)] for k, v in a.items()})  # type: ignore[misc]
        options = SkipOptions(router="trained", steps=STEPS, items=8, layers=(0,), capacity=0.3)
        result = SkipTokens(options)(dense, context(data))
        assert result.calibration is not None
        found.append(result.calibration.tensors["router.0"])
    assert torch.equal(*found)
