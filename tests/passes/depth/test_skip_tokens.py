"""Token skipping: the graph computes what loops over the chosen tokens of the eager model compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler.lowered import error, on_onnxruntime, on_openvino, proto
from tests.compiler.toys import TOKENS, Block, Toy, traced
from tests.passes.depth.test_drop_blocks import (
    DATA,
    LAYERS,
    Kind,
    PostNorm,
    masked,
    model,
    program,
    x,
)
from tests.passes.sparsity.toys import ITEMS, noise
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import RefusedError, UsageError, VerdictError
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import PassRecord, Program
from thresher.compiler.recipe import parse_recipe
from thresher.passes.depth.skip_tokens import SkipOptions, SkipTokens
from thresher.runtime.runner import ProgramRunner


def run(program: Program, context: Context = DATA, **options: Any) -> PassResult:
    return SkipTokens(SkipOptions(**options))(program, context)


def lengths(kind: Kind, layer: int) -> tuple[Tensor, Tensor]:
    """``[T, C]`` tokens before a block over the data and ``[T]`` lengths of what it adds, by hooks."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = (
        model(kind)
        .blocks[layer]
        .register_forward_hook(
            lambda module, given, y: seen.append((given[0].flatten(0, 1), y.flatten(0, 1)))
        )
    )
    arrays, _ = noise().take(range(ITEMS))
    with torch.no_grad():
        model(kind)(torch.from_numpy(arrays["x"]))
    handle.remove()
    ((before, behind),) = seen
    return before.double(), (behind - before).double().norm(dim=1)


def skipped(kind: Kind, inputs: Tensor, probes: dict[int, np.ndarray], keep: int) -> Tensor:
    """The eager model with some blocks called on the class token and the best-scored others alone."""
    made = model(kind)
    with torch.no_grad():
        y = torch.cat([made.cls_token.expand(len(inputs), -1, -1), inputs], 1)
        for layer, block in enumerate(made.blocks):
            if layer not in probes:
                y = block(y)
                continue
            rows = []
            for sample in y:
                scores = sample.double().numpy() @ probes[layer][:-1] + probes[layer][-1]
                best = 1 + np.argsort(-scores[1:], kind="stable")[: keep - 1]
                chosen = [0, *sorted(best.tolist())]
                moved = sample.clone()
                moved[chosen] = block(sample[None, chosen])[0]
                rows.append(moved)
            y = torch.stack(rows)
        logits: Tensor = made.head(made.norm(y)[:, 0])
        return logits


@pytest.mark.parametrize("kind", [Block, pytest.param(PostNorm, marks=pytest.mark.slow)])
def test_numbers_match_an_eager_model_that_skips(kind: Kind) -> None:
    result = run(program(kind), capacity=0.5)
    assert (result.matched, result.applied) == (LAYERS // 2, LAYERS // 2)
    assert result.details["running"] == [TOKENS + 1, 6]
    probes = {}
    for layer in (1, 3):
        rows, wanted = lengths(kind, layer)
        design = np.concatenate([rows.numpy(), np.ones((len(rows), 1))], 1)
        probes[layer] = np.linalg.lstsq(design, wanted.numpy(), rcond=None)[0]
        left = wanted.numpy() - design @ probes[layer]
        explained = 1 - left.var() / wanted.numpy().var()
        assert result.details["explained"][str(layer)] == pytest.approx(explained, abs=0.02)
        assert result.calibration is not None
        found = result.calibration.tensors[f"router.{layer}"].double().numpy()
        scale = np.abs(wanted.numpy()).mean()
        np.testing.assert_allclose(design @ found, design @ probes[layer], atol=0.05 * scale)
        probes[layer] = found
    want = skipped(kind, x(4), probes, 6)
    torch.testing.assert_close(result.program.run({"x": x(4)})["output"], want)
    assert result.details["macs"] == total_macs(result.program.graph)


def test_full_capacity_asks_for_no_change() -> None:
    done = run(program(), capacity=1.0)
    assert (done.matched, done.applied, done.program) == (2, 0, program())


@pytest.mark.parametrize("part", ["block", "ffn"])
def test_a_budget_is_met_as_closely_as_tokens_allow(part: str) -> None:
    details = run(program(), flops=0.8, part=part, layers=(0, 1, 2, 3)).details
    share = details["macs"] / details["dense_macs"]
    one = 1 / (TOKENS + 1)
    assert 0.8 - one <= share <= 0.8


def test_a_saved_fit_makes_the_same_graph_without_data(tmp_path: Path) -> None:
    first = run(program(), capacity=0.5)
    assert first.calibration is not None
    first.calibration.write(tmp_path)
    file = tmp_path / first.calibration.file
    again = run(program(), Context(), capacity=0.5, calibration=file).program
    torch.testing.assert_close(again.run({"x": x()}), first.program.run({"x": x()}), rtol=0, atol=0)
    with pytest.raises(UsageError, match="holds nothing for 0"):
        run(program(), Context(), layers=(0,), calibration=file)
    with pytest.raises(UsageError, match="made on other weights"):
        run(traced(Toy()), Context(), calibration=file)


@pytest.mark.slow
def test_back_ends_agree() -> None:
    made = run(program(), Context(), capacity=0.4, router="random").program
    fitted = run(program(), capacity=0.4).program
    for one in (made, fitted):
        for back_end in (on_onnxruntime, on_openvino):
            assert error(back_end(proto(one), {"x": x(2)}), one, {"x": x(2)}) < 1e-5
    half = on_onnxruntime(proto(fitted, "fp16"), {"x": x(2)})
    assert error(half, fitted, {"x": x(2)}) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.slow
def test_lengths_and_batches_stay_dynamic() -> None:
    made = run(program(pool="mean", dynamic=True), capacity=0.5).program
    for batch, tokens in ((1, 3), (4, 17)):
        assert made.run({"x": x(batch, tokens)})["output"].shape == (batch, 4)


def test_a_second_run_is_refused() -> None:
    first = run(program(), Context(), router="random")
    record = PassRecord("skip-tokens", {}, 2, 2)
    again = run(replace(first.program, history=(record,)))
    assert (again.applied, "skip blocks already" in again.refused[0].reason) == (0, True)


def test_what_cannot_be() -> None:
    causal = traced(Toy(Block(), Block(causal=True), Block(), pool="mean"))
    recipe = parse_recipe("passes: [skip-tokens: {router: random}]", "test")
    with pytest.raises(RefusedError, match=r"block 1 needs every token: attention .* is causal"):
        optimize(causal, recipe)
    with pytest.raises(UsageError, match="layers=4 does not exist: the model has 4 blocks, 0 to 3"):
        run(program(), layers=(4,))
    with pytest.raises(VerdictError, match=r"flops=0.2 cannot be met: .* through 2 blocks"):
        run(program(), flops=0.2)
    with pytest.raises(UsageError, match="needs data and none was given"):
        run(program(), Context())


class Watched(Block):
    """Gives what ``read`` sees of the stream before the block and of that between its halves."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Any:
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        y = x + self.proj(y.transpose(1, 2).flatten(2))
        seen = self.read(x, y)
        return y + self.fc2(F.gelu(self.fc1(y))), seen


class Aside(nn.Module):
    """Class logits, and what is seen inside the second of three blocks."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = Toy(Block(), Watched(read), Block())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.body.cls_token.expand(x.shape[0], -1, -1), x], 1)
        first, second, third = self.body.blocks
        x, seen = second(first(x))
        return self.body.head(self.body.norm(third(x))[:, 0]), seen


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda x, y: y.mean(1), ["mean"]),
        (lambda x, y: x.mean(1), ["mean"]),
        (lambda x, y: y[:, 4], ["select"]),
        (lambda x, y: y, ["output"]),
        (lambda x, y: y[:, 0] * x[:, :1].squeeze(1), []),
    ],
)
def test_what_is_read_between_the_ends_of_a_block(
    read: Callable[[Tensor, Tensor], Tensor], said: list[str]
) -> None:
    """Only the class token is there whoever runs."""
    done = run(traced(Aside(read)), Context(), layers=(1,), router="random")
    assert [refusal.reason.split(" goes to ")[-1] for refusal in done.refused] == said
    assert done.applied == (not said)


def test_padding_passes_by_before_any_real_token() -> None:
    """Room for all real tokens: they are what they are in the dense model."""
    _, padded, given = masked()
    made = run(padded, Context(), layers=(0,), capacity=0.5, router="random").program
    found, want = made.run(given)["output"], padded.run(given)["output"]
    torch.testing.assert_close(found[:, :4], want[:, :4])
    assert not torch.allclose(found[:, 4:], want[:, 4:])


def test_ties_between_tokens_may_fall_either_way(tmp_path: Path) -> None:
    """Tokens are chosen though none goes; a program that was saved still says so."""
    text = "passes: [skip-tokens: {layers: [0], router: random}]"
    made = optimize(program(), parse_recipe(text, "test"))
    assert made.ledger == ()
    made.save(tmp_path / "saved")
    assert ProgramRunner(Program.load(tmp_path / "saved"), threads=1).reduced
    assert not ProgramRunner(program(), threads=1).reduced


@pytest.mark.slow
def test_other_passes_before_and_behind() -> None:
    text = "passes: [drop-blocks: {drop: [2]}, skip-tokens: {layers: [0], router: random}, tome: {r: 2}]"
    made = optimize(program(), parse_recipe(text, "test"))
    assert [record.applied for record in made.history] == [1, 1, 2]
    assert "blocks.0 attends over another axis" in made.history[2].refused[0].reason
    assert made.run({"x": x()})["output"].shape == (3, 4)
