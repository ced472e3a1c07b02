"""Tail slice: equal to the eager model that has the sliced tensors, wherever the latents stand."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.families.entry import draw, randomise
from tests.families.latents import HEADS, LATENTS, SIDE, WIDTH, Resampler, Tokenizer
from thresher.compiler import optimize
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.lowering import to_onnx
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.recipe import load_recipe
from thresher.compiler.trace import trace
from thresher.passes.tokens.methods import Tome, TomeOptions
from thresher.passes.tokens.tail_slice import TailSlice, TailSliceOptions

CLOSE = 1e-6  # the oracle computes the same in another order
PATCHES = 36


class Block(nn.Module):
    """Batch first, and with attention written out if not ``fused``."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.fused = nn.LayerNorm(WIDTH), fused
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = functional.scaled_dot_product_attention(q, k, v, mask)
        else:
            logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            y = (logits if mask is None else logits + mask).softmax(-1) @ v
        added: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + added


class Encoder(nn.Module):
    """Class token, patches and latents, with the positions, masks and readouts that models have."""

    def __init__(
        self, latents: int = LATENTS, *, read: str = "tail", fused: bool = True, whole: bool = False,
        mask: str = "", front: bool = False, other: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latents, self.read, self.whole, self.mask = latents, read, whole, mask
        self.patch_embed, self.front = nn.Conv2d(3, WIDTH, 4, 4), front
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.latent = nn.Parameter(torch.zeros(1, latents, WIDTH))
        before = 1 + PATCHES
        self.pos_embed = nn.Parameter(torch.zeros(1, before + latents * whole, WIDTH))
        self.blocks = nn.ModuleList(Block(fused) for _ in range(2))
        self.head = nn.Linear(latents * WIDTH if read == "flat" else WIDTH, 5)
        self.other_latent = nn.Parameter(torch.zeros(1, other, WIDTH)) if other else None
        stored = torch.zeros(before + latents, before + latents)
        stored[:before, before:] = -1e4
        self.register_buffer("hidden", stored)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        batch = x.shape[0]
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(batch, -1, -1), x], dim=1)
        before, latents = x.shape[1], self.latent.expand(batch, -1, -1)
        x = x if self.whole else x + self.pos_embed
        x = torch.cat([latents, x] if self.front else [x, latents], dim=1)
        x = x + self.pos_embed if self.whole else x
        mask = {"": None, "stored": self.hidden, "made": self._made(x, before)}[self.mask]
        for block in self.blocks:
            x = block(x, mask)
        outputs = {"y": self.head(_read(x, self.read, before, self.latents))}
        if self.other_latent is not None:
            queries = self.other_latent.expand(batch, -1, -1)[:, None]
            keys = x[:, None, :before]
            outputs["asked"] = functional.scaled_dot_product_attention(queries, keys, keys)
        return outputs

    @staticmethod
    def _made(x: Tensor, before: int) -> Tensor:
        place = torch.arange(x.shape[1])
        hidden = (place[None, :] >= before) & (place[:, None] < before)
        return torch.where(hidden, -1e4, 0.0).to(x.dtype)


def _read(x: Tensor, how: str, before: int, latents: int) -> Tensor:
    if how == "class":
        return x[:, 0]
    if how == "patches":
        return x[:, 1:before]
    if how == "last":
        return x[:, -1]
    if how == "end":
        return x[:, -latents:]
    if how == "split":
        return torch.split(x, [before, latents], dim=1)[1]
    tail = x[:, before:]
    if how == "three":
        return tail[:, :3]
    if how == "third":
        return tail[:, 2]
    if how == "mixed":  # without a transpose, as TiTok's first release has it
        return tail.reshape(-1, WIDTH, latents).transpose(1, 2)
    return {
        "mean": tail.mean(1), "sum": tail.sum(1), "flat": tail.flatten(1), "tail": tail,
    }[how]  # fmt: skip


class Weighted(Resampler):
    """Its attention writes softmax and products out, as ``nn.MultiheadAttention`` does by default."""

    def __init__(self, latents: int = LATENTS) -> None:
        super().__init__(latents)
        self.weighted = True


MODELS: dict[str, Any] = {
    "tokenizer": Tokenizer,
    "resampler": Resampler,
    "resampler, written out": Weighted,
    "encoder, written out": partial(Encoder, fused=False),
    "encoder, one table": partial(Encoder, whole=True),
    "encoder, stored mask": partial(Encoder, mask="stored"),
    "encoder, made mask": partial(Encoder, mask="made", fused=False),
    **{
        f"encoder, reads {how}": partial(Encoder, read=how)
        for how in ("end", "split", "mean", "sum", "class", "patches")
    },
}


@cache
def model(name: str) -> nn.Module:
    full: nn.Module = MODELS[name]()
    randomise(full)
    return full.double().eval().requires_grad_(False)


def traced(full: nn.Module, dtype: torch.dtype = torch.float64) -> Program:
    example = {"x": draw(2, 3, SIDE, SIDE).to(dtype)}
    axes = {"x": {0: "batch"}}
    outputs = list(full(**example))
    return trace(full, example, dynamic=axes, info=SourceInfo("toy", "random"), outputs=outputs)


@cache
def program(name: str) -> Program:
    return traced(model(name))


def sliced(full: nn.Module, make: Any, keep: int) -> nn.Module:
    """The oracle: the same model made for ``keep`` latents, with the first rows of all that is longer."""
    small: nn.Module = make(keep).double().eval()
    state = copy.copy(full.state_dict())
    for name, wanted in small.state_dict().items():
        for axis, size in enumerate(wanted.shape):
            state[name] = state[name].narrow(axis, 0, size)
    small.load_state_dict(state)
    return small.requires_grad_(False)


def run(subject: Program, **options: Any) -> PassResult:
    return TailSlice(TailSliceOptions(**options))(subject, Context())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "tokenizer" else ()) for n in MODELS]
)
@settings(max_examples=4, deadline=None)
@given(keep=st.integers(1, LATENTS - 1), batch=st.integers(1, 4))
def test_equals_the_model_with_sliced_tensors(name: str, keep: int, batch: int) -> None:
    result = run(program(name), tokens=keep)
    assert (result.matched, result.applied) == (1, 1)
    x = {"x": draw(batch, 3, SIDE, SIDE)}
    expected = sliced(model(name), MODELS[name], keep)(**x)
    got = result.program.run(x)
    assert got.keys() == expected.keys()
    for key, want in expected.items():
        assert got[key].shape == want.shape
        assert got[key].dtype == want.dtype
        assert float((got[key] - want).abs().max()) < CLOSE, key


@pytest.mark.parametrize("name", [pytest.param("tokenizer", marks=pytest.mark.slow), "resampler"])
def test_onnxruntime_agrees(name: str) -> None:
    import onnxruntime

    single = traced(copy.deepcopy(model(name)).float(), torch.float32)
    made = optimize(single, load_recipe("tail-slice", ["tokens=5"]))
    file = onnx_ir.to_proto(to_onnx(made)).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = draw(batch, 3, SIDE, SIDE)
        expected = sliced(model(name), MODELS[name], 5)(x=x)
        found = session.run(list(expected), {"x": x.float().numpy()})
        for want, got in zip(expected.values(), found, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=2e-4, atol=2e-4)


def test_work_left_is_told() -> None:
    dense = program("tokenizer")
    result = run(dense, tokens=0.25)
    details = result.details
    assert details["latents"] == {"latent_tokens": [LATENTS, 3]}
    assert details["dense_macs"] == total_macs(dense.graph)
    assert details["macs"] == total_macs(result.program.graph) == total_macs(
        traced(sliced(model("tokenizer"), Tokenizer, 3)).graph
    )  # fmt: skip
    assert details["ideal"] == details["dense_macs"] / details["macs"] > 1
    assert "nested" in details["note"]


def test_a_second_run_slices_what_is_left() -> None:
    twice = run(run(program("tokenizer"), tokens=8).program, tokens=3)
    once = run(program("tokenizer"), tokens=3)
    x = {"x": draw(2, 3, SIDE, SIDE)}
    for first, second in zip(
        twice.program.run(x).values(), once.program.run(x).values(), strict=True
    ):
        assert torch.equal(first, second)
    assert run(once.program, tokens=3).applied == 0


def test_groups_are_told_apart_by_name() -> None:
    make = partial(Encoder, other=8)
    full = make()
    randomise(full)
    both = traced(full.double().eval())
    with pytest.raises(
        UsageError, match=r"2 groups of latents.*latents=latent or latents=other_latent"
    ):
        run(both, tokens=3)
    with pytest.raises(UsageError, match=r"latents=latnt does not exist.*did you mean 'latent'"):
        run(both, tokens=3, latents="latnt")
    one = run(both, tokens=3, latents="other_latent").program
    shapes = {spec.name: spec.shape[-2] for spec in one.outputs}
    assert shapes == {"y": LATENTS, "asked": 3}
    x = {"x": draw(2, 3, SIDE, SIDE)}
    want = full(**x)
    assert torch.allclose(one.run(x)["asked"], want["asked"][:, :, :3], atol=CLOSE, rtol=0)
    assert torch.allclose(one.run(x)["y"], want["y"], atol=CLOSE, rtol=0)


@pytest.mark.parametrize(
    ("options", "keep", "said"),
    [
        ({"front": True}, 3, "cat_1 .* puts something after it"),
        ({"read": "last"}, 3, "select.* reads an entry counted from its end"),
        ({"read": "flat"}, 3, "linear.* multiplies it by a weight"),
        ({"read": "mixed"}, 3, "reshapes it together with its neighbours"),
        ({"read": "mixed", "latents": 8}, 3, "reshapes it together with its neighbours"),
        ({"read": "three"}, 2, "slice.* takes a part of it"),
        ({"read": "third"}, 2, "select.* reads entry 2, and 2 would be left"),
    ],
)
def test_what_needs_every_latent_is_named(options: dict[str, Any], keep: int, said: str) -> None:
    full = Encoder(**options).eval()
    subject = traced(full, torch.float32)
    result = run(subject, tokens=keep)
    assert result.applied == 0
    assert result.program is subject
    with pytest.raises(RefusedError, match=said):
        optimize(subject, load_recipe("tail-slice", [f"tokens={keep}"]))


def test_entries_that_stay_may_be_read() -> None:
    for how in ("three", "third"):
        assert run(traced(Encoder(read=how).eval(), torch.float32), tokens=3).applied == 1


@pytest.mark.parametrize("latents", [LATENTS, 2 * PATCHES])
@pytest.mark.parametrize("read", ["tail", "end"])
def test_no_other_method_merges_latents(latents: int, read: str) -> None:
    subject = traced(Encoder(latents, read=read).eval(), torch.float32)
    result = Tome(TomeOptions(r=4))(subject, Context())
    assert result.applied == 0
    assert "as where latents are appended to patches" in result.refused[0].reason


def test_counts_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="tokens=13 is more than the 12 latents of latent_tokens"):
        run(program("tokenizer"), tokens=13)
    for wrong in ("0", "-1", "1.5"):
        with pytest.raises(UsageError, match="tokens"):
            load_recipe("tail-slice", [f"tokens={wrong}"])
    with pytest.raises(RefusedError, match="ask for no change"):
        optimize(program("tokenizer"), load_recipe("tail-slice", ["tokens=1.0"]))
