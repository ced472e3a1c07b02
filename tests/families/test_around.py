"""Merging around attention on every family, against dense attention over repeated tokens.

The oracle never has fewer tokens.  Each token's attention input is replaced by the mean of its group, and
queries, keys, values and masks are read at the group's destination; proportional attention over merged
tokens is dense attention over such repetitions, and without sizes each repetition weighs ``1 / n``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.compiler.lowered import RUN, error
from tests.families.decisions import merge
from tests.families.entry import Entry
from tests.families.traced import cast, program
from tests.families.zoo import BY_NAME, REDUCIBLE
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.lowering import to_onnx
from thresher.compiler.program import Program
from thresher.passes.tokens.tomesd import Tomesd, TomesdOptions

SIZES_IN_FLOAT32 = 3e-6  # relative
FLOAT32 = 2e-4
# What attention alone reads: the norm before it, or where that is the stream itself the attention's input.
NORMS = r"\.(norm1|layernorm_before|layer_norm1|self_attn_layer_norm|attn_norm|pre_norm)$"
NAMED = {"compact:cct": r"blocks\.\d+\.norm$"}
INPUTS = {"hf:bert": r"\.attention\.self$", "hf:wav2vec2": r"\.attention$"}
FAMILIES = [entry.name for entry in REDUCIBLE]
SHARP = ("timm:vit_small_patch14_reg4_dinov2", "timm:vit_base_patch16_siglip_224", "hf:bert")
CASES = [pytest.param(f, marks=() if f in SHARP else pytest.mark.slow) for f in FAMILIES]


def run(name: str, dtype: torch.dtype, **options: Any) -> PassResult:
    return Tomesd(TomesdOptions(**options))(program(name, dtype), Context())


@lru_cache(maxsize=1)  # back ends of a family are neighbours
def lowered(name: str) -> tuple[Program, onnx.ModelProto]:
    made = run(name, torch.float32, keep=0.6).program
    return made, onnx_ir.to_proto(to_onnx(made))


class Repeated(TorchFunctionMode):
    """An eager model whose attention sees every token as its group's mean."""

    def __init__(self, real: Tensor | None, prefix: int, keep: float, proportional: bool) -> None:
        super().__init__()
        self.real, self.prefix, self.share, self.proportional = real, prefix, keep, proportional
        self.at = torch.zeros(0)  # [B, N] destination of each token
        self.members = torch.zeros(0)  # [B, N] real tokens of its group

    def grouped(self, compared: Tensor, y: Tensor) -> Tensor:
        """Group means of ``y`` at every member, by the likeness of ``compared``."""
        batch, tokens, _ = y.shape
        real = torch.ones(batch, tokens, dtype=torch.bool) if self.real is None else self.real
        left = self.prefix - int(-(tokens - self.prefix) * self.share // 1)
        self.at = torch.arange(tokens).repeat(batch, 1)
        for b in range(batch):
            sizes = real[b].double().tolist()
            sequence = list(range(tokens))
            step = merge(sequence, compared[b].double(), sizes, self.prefix, tokens - left)
            for source, destination in step.merged.items():
                self.at[b, source] = destination
        same = (self.at[:, :, None] == self.at[:, None]).double() * real[:, None].double()
        self.members = same.sum(-1)
        weight = same / self.members[..., None].clamp(min=1.0)
        means = (weight @ y.double()).to(y.dtype)
        return torch.where(self.members[..., None] > 0, means, self._taken(y, 1))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention or args[0].shape[-2] != self.at.shape[-1]:
            return func(*args, **kwargs)
        q, k, v = (self._taken(operand, 2) for operand in args[:3])
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        bias = torch.zeros(len(q), 1, q.shape[-2], k.shape[-2], dtype=q.dtype)
        if mask is not None:
            given = torch.where(mask, 0.0, -torch.inf).to(q) if mask.dtype == torch.bool else mask
            whole = given.expand(len(q), -1, *bias.shape[2:])
            bias = self._taken(self._taken(whole, 2), 3)
        if not self.proportional:
            bias = bias - self.members.clamp(min=1.0).log().to(q)[:, None, None]
        if self.real is not None:
            bias = bias.masked_fill(~self.real[:, None, None], -torch.inf)
        return func(q, k, v, attn_mask=bias, scale=kwargs.get("scale"))

    def _taken(self, x: Tensor, axis: int) -> Tensor:
        rows = x.movedim(axis, 1)
        return torch.stack([r[at] for r, at in zip(rows, self.at, strict=True)]).movedim(1, axis)


@contextmanager
def hooks(entry: Entry, model: nn.Module, oracle: Repeated) -> Iterator[list[str]]:
    """Puts the oracle's means where attention reads; yields the modules that they were put in."""
    found, handles = list[str](), []

    def behind_norm(module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return oracle.grouped(given[0], y)

    def before(module: nn.Module, given: Any, named: dict[str, Any]) -> Any:
        if given:
            return (oracle.grouped(given[0], given[0]), *given[1:]), named
        x = named["hidden_states"]
        return given, {**named, "hidden_states": oracle.grouped(x, x)}

    for name, module in model.named_modules():
        if entry.name in INPUTS:
            if re.search(INPUTS[entry.name], name):
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                found.append(name)
        elif re.search(NAMED.get(entry.name, NORMS), name):
            handles.append(module.register_forward_hook(behind_norm))
            found.append(name)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def repeated(
    name: str, inputs: dict[str, Tensor], keep: float, proportional: bool
) -> dict[str, Tensor]:
    """Outputs of the eager model with groups repeated."""
    entry = BY_NAME[name]
    model, _ = entry.build()
    real = entry.real(model, inputs) if entry.real else None
    oracle = Repeated(real, find_sites(program(name)).protected, keep, proportional)
    with hooks(entry, model, oracle) as found, oracle, torch.no_grad():
        assert len(found) == entry.layers
        outputs: dict[str, Tensor] = model(**inputs)
    return outputs


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention_over_repeated_tokens(name: str, proportional: bool) -> None:
    entry = BY_NAME[name]
    result = run(name, torch.float64, keep=0.6, prop_attn=proportional)
    assert (result.applied, result.refused) == (entry.layers, ())
    assert result.program.ledger == ()
    inputs = entry.inputs(3)
    want = repeated(name, inputs, 0.6, proportional)
    got = result.program.run(cast(inputs, torch.float64))
    real = entry.real(entry.build()[0], inputs) if entry.real else None
    assert got.keys() == want.keys()
    for key, value in got.items():
        shown = slice(None) if real is None or key not in entry.dense else real
        off = float((value[shown] - want[key][shown]).abs().max() / want[key][shown].abs().max())
        assert off < max(SIZES_IN_FLOAT32, 3 * entry.tolerance), (key, off)


@pytest.mark.parametrize("name", CASES)
def test_the_predicted_cost_is_that_of_the_graph(name: str) -> None:
    result = run(name, torch.float32, keep=0.6)
    merges = [n for n in result.program.graph.nodes if "bipartite" in str(n.target)]
    assert len(merges) == result.applied
    details = result.details
    assert details["dense_macs"] == total_macs(program(name, torch.float32).graph)
    assert details["macs"] + details["inserted_macs"] == total_macs(result.program.graph)
    steps = sum(_merge_macs(details["attended"][i], n) for i, n in enumerate(merges))
    assert abs(details["inserted_macs"] - steps) <= 0.001 * details["macs"]


def _merge_macs(attended: list[int], node: torch.fx.Node) -> int:
    tokens, left = attended
    width = int(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
    return ((tokens // 2) ** 2 + (tokens - left) ** 2) * width


@pytest.mark.parametrize("back_end", list(RUN))
@pytest.mark.parametrize("name", CASES)
def test_back_ends_agree(name: str, back_end: str) -> None:
    made, model = lowered(name)
    inputs = cast(BY_NAME[name].inputs(2), torch.float32)
    assert error(RUN[back_end](model, inputs), made, inputs) < FLOAT32
