"""ToaSt's importance against its formula in float64, written down without the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiler.toys import HEADS, WIDTH
from tests.passes.sparsity.toys import ITEMS, noise, toy
from thresher.compiler import pipeline
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program
from thresher.compiler.recipe import parse_recipe
from thresher.passes.learning.tap import Tapped
from thresher.passes.sparsity.channels import ChannelOptions, ChannelPruning
from thresher.passes.sparsity.sites import find

DATA = Context(data=noise(), batch=5, seed=3)


def run(program: Program, context: Context = DATA, **options: Any) -> PassResult:
    return ChannelPruning(ChannelOptions(score="toast", **options))(program, context)


def measured(result: PassResult) -> dict[str, Tensor]:
    assert result.calibration is not None
    return {k: t for k, t in result.calibration.tensors.items() if k.startswith("toast.")}


def expected(program: Program) -> list[tuple[Tensor, Tensor]]:
    """By block, ``2 |x_cls| + mean_i A |x_i|`` of what fc1 and fc2 read, on the plain toy."""
    weights = {k: v.detach().double() for k, v in program.exported.state_dict.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def worth(x: Tensor, row: Tensor) -> Tensor:
        others = (row[:, 1:, None] * x[:, 1:].abs()).sum(1) / (x.shape[1] - 1)
        return (2 * x[:, 0].abs() + others).mean(0)

    arrays, _ = noise().take(range(ITEMS))
    x = torch.from_numpy(arrays["x"]).double()
    x = torch.cat([weights["cls_token"].expand(len(x), 1, WIDTH), x], 1)
    found = []
    for block in ("blocks.0", "blocks.1"):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.qkv")
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (p.reshape(heads).transpose(1, 2) for p in qkv.chunk(3, -1))
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{block}.proj")
        y = norm(x, f"{block}.norm2")
        hidden = F.gelu(linear(y, f"{block}.fc1"))
        row = attention[:, :, 0].mean(1)
        found.append((worth(y, row), worth(hidden, row)))
        x = x + linear(hidden, f"{block}.fc2")
    return found


def test_the_class_token_says_what_matters() -> None:
    program = toy("plain", "plain")
    result = run(program, ratio=0.25, inputs=0.25, fold=False)
    have = measured(result)
    for layer, (read, hidden) in enumerate(expected(program)):
        torch.testing.assert_close(have[f"toast.{layer}.up"].double(), read, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            have[f"toast.{layer}.down"].double(), hidden, rtol=1e-5, atol=1e-6
        )
    kept = expected(program)[0][1].argsort(descending=True)[:24].sort().values
    (cut,) = (v for k, v in result.program.exported.state_dict.items() if k == "blocks.0.fc1.bias")
    assert torch.equal(cut, program.exported.state_dict["blocks.0.fc1.bias"][kept])


def test_without_one_a_sample_of_the_tokens_does() -> None:
    """Of 8 x 9 tokens 2 % are two, whichever: the importance is the mean of one pair of rows."""
    program = toy("plain", pool="mean")
    have = measured(run(program, Context(data=noise(8), batch=8, seed=3)))["toast.0.down"]
    rows: list[Tensor] = []
    arrays, _ = noise(8).take(range(8))
    (ffn,) = find(program).ffns
    Tapped(program).outputs({"x": torch.from_numpy(arrays["x"])}, {ffn.hidden: rows.append})
    sizes = rows[0].flatten(0, 1).abs()
    gaps = ((sizes[:, None] + sizes[None]) / 2 - have).abs().amax(-1)
    assert (gaps < 1e-6).sum() == 2  # the pair, and the pair
    other = measured(run(program, Context(data=noise(8), batch=8, seed=4)))["toast.0.down"]
    assert not torch.equal(have, other)


def test_tokens_that_went_before_are_refused() -> None:
    recipe = parse_recipe("passes: [{evit: {keep: 0.5}}, {channels: {score: toast}}]", "test")
    with pytest.raises(RefusedError, match="run channels before tokens are reduced"):
        pipeline.run(toy("plain", "plain"), recipe, DATA)


def test_a_calibration_without_it_does_not_do(tmp_path: Any) -> None:
    program = toy("plain")
    plain = ChannelPruning(ChannelOptions(ratio=0.5))(program, DATA)
    assert plain.calibration is not None
    plain.calibration.write(tmp_path)
    with pytest.raises(UsageError, match=r"was made with score=None and not\s+score=toast"):
        run(program, Context(), ratio=0.5, calibration=tmp_path / plain.calibration.file)
