"""Depth pruning: graphs without blocks equal models that were built without them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler.lowered import error, on_onnxruntime, proto
from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from tests.passes.sparsity.toys import ITEMS, noise
from thresher.compiler.analysis.branches import blocks, find_branches, halves, live_macs
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import RefusedError, UsageError, VerdictError
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import PassRecord, Program, SourceInfo
from thresher.compiler.recipe import parse_recipe
from thresher.compiler.trace import trace
from thresher.models.data import Dataset
from thresher.passes.depth.drop_blocks import DropBlocks, DropOptions
from thresher.passes.depth.influence import influences
from thresher.passes.depth.skip_tokens import SkipOptions, SkipTokens
from thresher.passes.learning import calibration
from thresher.passes.learning.tap import Tapped

DATA = Context(data=noise(), batch=5)
LAYERS = 4
Kind: TypeAlias = Callable[[], Block]


class PostNorm(Block):
    """The norms stand behind the sums."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = self.norm1(x + y)
        normed: Tensor = self.norm2(x + self.fc2(F.gelu(self.fc1(x))))
        return normed


class Parallel(Block):
    """Attention and the feed-forward network read the same tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(y).chunk(3, -1))
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        summed: Tensor = x + y + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return summed


@cache
def model(kind: Kind = Block, pool: str = "class") -> Toy:
    torch.manual_seed(3)
    made = Toy(*(kind() for _ in range(LAYERS)), pool=pool)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return made.eval()


@cache
def program(kind: Kind = Block, pool: str = "class", dynamic: bool = False) -> Program:
    return traced(model(kind, pool), dynamic=dynamic)


def run(program: Program, context: Context = DATA, **options: Any) -> PassResult:
    return DropBlocks(DropOptions(**options))(program, context)


def x(batch: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def without(kind: Kind, *layers: int) -> Toy:
    """The same model built with fewer blocks."""
    made = copy.deepcopy(model(kind))
    made.blocks = nn.ModuleList(b for i, b in enumerate(made.blocks) if i not in layers)
    return made


def turned(kind: Kind) -> list[float]:
    """Block influences by hooks on the eager model, in double precision."""
    made, seen = copy.deepcopy(model(kind)).double(), list[float]()

    def hook(module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        cosine = (given[0] * y).sum(-1) / given[0].norm(dim=-1) / y.norm(dim=-1)
        seen.append(1 - float(cosine.mean()))

    for block in made.blocks:
        block.register_forward_hook(hook)
    arrays, _ = noise().take(range(ITEMS))
    with torch.no_grad():
        made(torch.from_numpy(arrays["x"]).double())
    return seen


@pytest.mark.parametrize("kind", [Block, PostNorm])
def test_the_least_influential_blocks_go_and_the_rest_is_the_smaller_model(
    kind: Kind,
) -> None:
    expected = turned(kind)
    result = run(program(kind), count=2)
    assert (result.matched, result.applied) == (LAYERS, 2)
    assert list(result.details["influence"].values()) == pytest.approx(expected, rel=1e-4)
    gone = sorted(sorted(range(LAYERS), key=lambda i: expected[i])[:2])
    assert result.details["dropped"] == [str(i) for i in gone]
    with torch.no_grad():
        want = without(kind, *gone)(x())
    torch.testing.assert_close(result.program.run({"x": x()})["output"], want)
    names = {n.name for n in result.program.graph.nodes}
    assert not any(f"blocks_{i}_" in name for i in gone for name in names)  # nor their weights
    assert result.details["macs"] == total_macs(result.program.graph)


@pytest.mark.parametrize("kind", [Block, Parallel])
def test_halves_that_go_are_halves_that_add_nothing(kind: Kind) -> None:
    names = ("0.ffn", "2.attention", "3.attention")
    result = run(program(kind), Context(), part="half", drop=names)
    assert (result.matched, result.applied) == (2 * LAYERS, 3)
    mute = copy.deepcopy(model(kind))
    with torch.no_grad():
        for name in names:
            block, half = mute.blocks[int(name[0])], name[2:]
            linear = getattr(block, "fc2" if half == "ffn" else "proj")
            linear.weight.zero_(), linear.bias.zero_()
        want = mute(x())
    torch.testing.assert_close(result.program.run({"x": x()})["output"], want)


def test_saved_names_make_the_same_graph_without_data() -> None:
    first = run(program(), flops=0.6, part="half")
    assert isinstance(first.options, DropOptions)
    again = DropBlocks(first.options)(program(), Context())
    assert [n.name for n in again.program.graph.nodes] == [
        n.name for n in first.program.graph.nodes
    ]
    mixed = run(program(), Context(), drop=[0, "1.ffn"])
    assert mixed.details["dropped"] == ["0", "1.ffn"]


@pytest.mark.parametrize("part", ["block", "half"])
def test_a_budget_is_met_by_as_few_parts_as_can_be(part: str) -> None:
    details = run(program(), flops=0.7, part=part).details
    assert details["macs"] <= 0.7 * details["dense_macs"]
    ranked = sorted(details["dropped"], key=lambda name: details["influence"][name])
    found = {p.name: p for p in (blocks if part == "block" else halves)(find_branches(program()))}
    fewer = [b for name in ranked[:-1] for b in found[name].branches]
    assert live_macs(program(), fewer) > 0.7 * details["dense_macs"]


def test_lengths_and_batches_stay_dynamic() -> None:
    made = run(program(pool="mean", dynamic=True), Context(), drop=[1]).program
    for batch, tokens in ((1, 3), (4, 17)):
        assert made.run({"x": x(batch, tokens)})["output"].shape == (batch, 4)


def test_onnx_runtime_agrees() -> None:
    made = run(program(), Context(), drop=["1", "2.ffn"]).program
    found = on_onnxruntime(proto(made), {"x": x(2)})
    assert error(found, made, {"x": x(2)}) < 1e-5


@pytest.mark.slow
def test_tokens_leave_before_and_after() -> None:
    """A dropped half is one that adds nothing, whatever happens to the tokens."""
    mute = copy.deepcopy(model())
    block = mute.blocks[1]
    with torch.no_grad():
        for linear in (block.proj, block.fc2):
            assert isinstance(linear, nn.Linear)
            linear.weight.zero_(), linear.bias.zero_()
    tome = "tome: {r: 2, layers: [%s]}"
    drop = "drop-blocks: {drop: [1]}"
    merged = optimize(traced(mute), parse_recipe(f"passes: [{tome % '0, 1'}]", "test"))
    after = optimize(program(), parse_recipe(f"passes: [{tome % '0, 1'}, {drop}]", "test"))
    feeds = {"x": x()}
    torch.testing.assert_close(after.run(feeds)["output"], merged.run(feeds)["output"])
    before = optimize(program(), parse_recipe(f"passes: [{drop}, {tome % '0'}]", "test"))
    muted = optimize(traced(without(Block, 1)), parse_recipe(f"passes: [{tome % '0'}]", "test"))
    torch.testing.assert_close(before.run(feeds)["output"], muted.run(feeds)["output"])


def test_influence_is_measured_behind_a_token_pass() -> None:
    merged = optimize(program(), parse_recipe("passes: [tome: {r: 2}]", "test"))
    result = run(merged, count=1)
    assert len(result.details["influence"]) == LAYERS
    assert min(result.details["influence"].values()) > 0


def test_a_second_run_is_refused() -> None:
    first = run(program(), Context(), drop=[1])
    record = PassRecord("drop-blocks", {}, 4, 1)
    again = run(replace(first.program, history=(record,)), count=1)
    assert (again.applied, again.refused[0].reason.split(":")[0]) == (
        0,
        "blocks were left out already",
    )


class Masked(nn.Module):
    """The mask is made behind the first tokens; padding is told by an input, which may be the mask."""

    def __init__(self, *, ready: bool = False) -> None:
        super().__init__()
        self.ready = ready
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = self.norm(x)
        mask = real if self.ready else torch.where(real[:, None, None, :] > 0, 0.0, -1e9)
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + y.transpose(1, 2).flatten(2)


def masked(ready: bool = False) -> tuple[Masked, Program, dict[str, Tensor]]:
    """Model, Program and inputs whose first four tokens are real."""
    arrays, _ = noise().take(range(8))
    given = {"x": torch.from_numpy(arrays["x"]), "real": torch.ones(8, TOKENS, dtype=torch.int64)}
    given["real"][:, 4:] = 0
    if ready:
        given["real"] = given["real"][:, None, None, :].bool()
    made, axes = Masked(ready=ready).eval(), {"x": {0: "batch"}, "real": {0: "batch"}}
    return made, trace(made, given, dynamic=axes, info=SourceInfo("masked")), given


@pytest.mark.parametrize("ready", [False, True])
def test_padding_is_left_out_of_the_measure(ready: bool) -> None:
    made, padded, given = masked(ready)

    def read(chosen: Sequence[int]) -> dict[str, Any]:
        return {key: value[list(chosen)].numpy() for key, value in given.items()}

    (part,) = blocks(find_branches(padded))
    context = Context(data=Dataset("padded", 8, None, read), batch=4)
    (found,) = influences(padded, [part], context, range(8), "drop-blocks")
    with torch.no_grad():
        before, behind = (t[:, :4].double() for t in (made.norm(given["x"]), made(**given)))
    cosine = F.cosine_similarity(before, behind, dim=-1).mean()
    assert found == pytest.approx(1 - float(cosine), rel=1e-5)


def test_a_mask_that_is_the_same_for_all_items_tells_no_padding() -> None:
    given = {"x": x(), "real": torch.ones(TOKENS, TOKENS, dtype=torch.bool)}
    axes = {"x": {0: "batch"}}
    made = trace(Masked(ready=True).eval(), given, dynamic=axes, info=SourceInfo("masked"))
    sites = find_sites(made)
    assert (len(sites.sites), sites.padding) == (1, None)
    Tapped(made).outputs(given, {})


def test_what_was_measured_on_another_model_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts have the same names."""
    monkeypatch.setattr(calibration, "SAVE_EVERY", 1)
    kept = replace(DATA, checkpoints=tmp_path)
    for pass_ in (DropBlocks(DropOptions(count=1)), SkipTokens(SkipOptions())):
        assert pass_(program(), kept).applied
        with pytest.raises(UsageError, match=r"belongs to another run \(program was"):
            pass_(traced(Toy(*(Block() for _ in range(LAYERS)))), kept)


class Plain(nn.Module):
    """Linears without a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return y


def test_long_skips_are_no_branches() -> None:
    long = traced(Toy(Block(), Block(), skip=True))
    assert len(find_branches(long)) == 4


def test_causal_models_are_taken() -> None:
    causal = traced(Toy(Block(causal=True), Block(causal=True), pool="mean"))
    assert run(causal, Context(), drop=[1]).details["dropped"] == ["1"]


def test_what_cannot_be() -> None:
    with pytest.raises(RefusedError, match="no residual branch was found"):
        optimize(traced(Plain()), parse_recipe("passes: [drop-blocks]", "test"), DATA)
    with pytest.raises(UsageError, match=r"count=4 leaves nothing .* give 3 or less"):
        run(program(), count=4)
    with pytest.raises(
        UsageError, match=r"drop=7 does not exist .* its parts are 0, 1, 2, 3, 0.att"
    ):
        run(program(), Context(), drop=[7])
    with pytest.raises(VerdictError, match=r"flops=0.01 cannot be met: .* of 4 parts left out 0.2"):
        run(program(), flops=0.01)
    with pytest.raises(UsageError, match="needs data and none was given"):
        run(program(), Context())
