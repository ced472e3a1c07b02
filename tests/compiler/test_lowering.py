"""A lowered Program computes what the eager one does, on every back end and at every size."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compiler.lowered import RUN, error, on_onnxruntime, ours, proto
from tests.compiler.toys import HEADS, TOKENS, WIDTH, Block, Toy, traced
from thresher.compiler.contract import Context
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.lowering.inline import inlined
from thresher.compiler.lowering.onnx_export import to_onnx
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.kernels.registry import PLUGIN
from thresher.passes.tokens.methods import Evit, RandomDrop, Tome, TopkNorm

CLOSE = 1e-5  # of the largest output, in float32
METHODS: dict[str, Any] = {"tome": Tome, "evit": Evit, "topk-norm": TopkNorm}


def reduced(program: Program, method: str, **options: Any) -> Program:
    make = METHODS[method]
    result: Program = make(make.Options(**options))(program, Context()).program
    return result


def images(batch: int, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch + tokens)
    return {"x": torch.randn(batch, tokens, WIDTH, generator=generator)}


@cache
def lowered(pool: str, method: str | None) -> tuple[Program, onnx.ModelProto]:
    """Lowered once for all back ends."""
    program = traced(Toy(pool=pool))
    if method is not None:
        program = reduced(program, method, keep=0.7)
    return program, proto(program)


@pytest.mark.parametrize("back_end", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("pool", ["class", "mean", "dense"])
@pytest.mark.parametrize(
    "method", [None, "tome", "evit", pytest.param("topk-norm", marks=pytest.mark.slow)]
)
def test_lowered_equals_eager(back_end: str, pool: str, method: str | None) -> None:
    pytest.importorskip(back_end)
    if method == "evit" and pool == "mean":
        pytest.skip("there is no class token to score by")
    program, model = lowered(pool, method)
    for batch in (1, 3):
        assert error(RUN[back_end](model, images(batch)), program, images(batch)) < CLOSE
    assert len(ours(model)) >= len(program.ledger)


@pytest.mark.parametrize("method", ["tome", pytest.param("topk-norm", marks=pytest.mark.slow)])
def test_counts_follow_a_symbolic_length(method: str) -> None:
    program = reduced(traced(Toy(), dynamic=True), method, keep=0.7)
    model = proto(program)
    for tokens in (1, 2, 3, 9, 14):
        feeds = images(2, tokens)
        assert error(on_onnxruntime(model, feeds), program, feeds) < CLOSE


def test_names_and_axes_are_the_users() -> None:
    model = proto(traced(Toy(), dynamic=True))
    (given,), (result,) = model.graph.input, model.graph.output
    axes = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert (given.name, axes) == ("x", ["batch", "tokens", WIDTH])
    axes = [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim]
    assert (result.name, axes) == ("output", ["batch", 4])


def test_one_node_per_step_with_a_body_and_the_plugin_attributes() -> None:
    program = reduced(traced(Toy()), "tome", r=2)
    model = proto(program)
    nodes = ours(model)
    assert [node.op_type for node in nodes] == ["BipartiteMerge"] * len(program.ledger)
    for node in nodes:
        texts = {a.name: a.s.decode() for a in node.attribute if a.name in PLUGIN}
        assert texts == PLUGIN
    (body,) = model.functions
    assert (body.domain, body.name) == ("thresher", "BipartiteMerge")
    assert [o.version for o in model.opset_import if not o.domain] == [20]


def test_nobody_pays_for_maps_that_nobody_reads() -> None:
    program = traced(Toy(pool="dense"))
    restored = proto(reduced(program, "tome", r=2))
    short = proto(reduced(program, "tome", r=2, restore=False))
    assert [len(node.output) for node in ours(short)] == [2, 2]
    steps = [n for n in ours(restored) if n.op_type == "BipartiteMerge"]
    assert [len(node.output) for node in steps] == [4, 4]
    assert len(short.functions[0].node) < len(restored.functions[0].node)


def test_kept_sources_by_rank_where_the_published_order_is_asked_for() -> None:
    model = proto(reduced(traced(Toy(pool="mean")), "tome", r=2, order="reference"))
    assert {node.op_type for node in ours(model)} == {"RankedBipartiteMerge"}


def test_the_random_control_is_the_same_everywhere() -> None:
    program = traced(Toy())
    program = RandomDrop(RandomDrop.Options(keep=0.5))(program, Context()).program
    assert error(on_onnxruntime(proto(program), images(2)), program, images(2)) < CLOSE


def test_inlined_models_know_only_standard_operators() -> None:
    flat = inlined(proto(reduced(traced(Toy()), "tome", r=2)))
    assert not flat.functions
    assert {node.domain for node in flat.graph.node} <= {"", "ai.onnx"}


def test_nodes_say_where_they_come_from_and_nothing_about_this_machine() -> None:
    model = proto(reduced(traced(Toy()), "tome", r=2))
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        assert set(notes) <= {"thresher.module", "thresher.pass"}
        if node.domain == "thresher":
            assert notes == {"thresher.module": notes["thresher.module"], "thresher.pass": "tome"}
            assert notes["thresher.module"].startswith("blocks.")
        if node.op_type == "Softmax":  # made by the lowering, but nobody's insertion
            assert "thresher.pass" not in notes
            assert notes["thresher.module"].startswith("blocks.")
    text = model.SerializeToString()
    assert b".py" not in text
    assert b"torch.ops" not in text


def test_weights_are_shared_until_the_model_is_saved() -> None:
    program = traced(Toy())
    weight = program.exported.state_dict["head.weight"]
    stored = to_onnx(program).graph.initializers["head.weight"].const_value
    assert stored is not None
    assert stored.numpy().ctypes.data == weight.data_ptr()


def test_the_graph_is_no_larger_than_the_plain_exporters() -> None:
    model = Toy().eval()
    ours_ = proto(traced(model))
    plain = torch.onnx.export(
        model, (torch.randn(2, TOKENS, WIDTH),), dynamo=True, opset_version=20, verbose=False,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )  # fmt: skip
    assert plain is not None
    theirs = Counter(node.op_type for node in plain.model_proto.graph.node)
    mine = Counter(node.op_type for node in ours_.graph.node)
    assert not mine - theirs


class Attend(nn.Module):
    """One attention with everything that torch's may have."""

    def __init__(self, kv_heads: int = HEADS, **options: Any) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * kv_heads * (WIDTH // HEADS))
        self.kv_heads, self.options = kv_heads, options

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).reshape(batch, tokens, HEADS, -1).transpose(1, 2)
        kv = self.kv(x).reshape(batch, tokens, 2, self.kv_heads, WIDTH // HEADS)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "model",
    [
        Attend(),
        Attend(scale=0.7),
        Attend(is_causal=True),
        Attend(kv_heads=1, enable_gqa=True),
        Attend(kv_heads=1, enable_gqa=True, is_causal=True),
    ],
    ids=["plain", "scale", "causal", "grouped", "grouped-causal"],
)
def test_attention_in_every_form(model: Attend, precision: str) -> None:
    program = traced(model, dynamic=True)
    found = on_onnxruntime(proto(program, precision), images(3, 5))
    assert error(found, program, images(3, 5)) < (CLOSE if precision == "fp32" else 5e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["keys", "full", "bool", "lowest"])
def test_masks_in_every_form(kind: str, precision: str) -> None:
    torch.manual_seed(0)
    hidden = torch.rand(2, 1, 1 if kind == "keys" else TOKENS, TOKENS) < 0.4
    hidden[..., 0] = False
    mask = torch.randn(hidden.shape)
    if kind == "bool":
        mask = ~hidden
    elif kind == "lowest":  # as Hugging Face writes it; float16 knows no such number
        mask = hidden.float() * torch.finfo(torch.float32).min
    feeds = images(2) | {"mask": mask}
    program = trace(
        Attend(), feeds, dynamic={"x": {0: "batch"}, "mask": {0: "batch"}}, info=SourceInfo("toy")
    )
    found = on_onnxruntime(proto(program, precision), feeds)
    assert error(found, program, feeds) < (CLOSE if precision == "fp32" else 5e-3)


def test_dropping_out_is_refused_by_name() -> None:
    program = traced(Attend(dropout_p=0.1))
    with pytest.raises(RefusedError, match=r"attention.* drops out with probability 0.1"):
        to_onnx(program)


class Exotic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = torch.special.airy_ai(x)
        return value


def test_an_operator_without_an_onnx_form_is_refused_by_name() -> None:
    with pytest.raises(RefusedError, match=r"toy cannot be written as ONNX: .*airy_ai"):
        to_onnx(traced(Exotic()))


def test_an_unknown_precision_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'fp8' is unknown"):
        to_onnx(traced(Toy()), precision="fp8")


def test_lowering_leaves_the_program_as_it_was() -> None:
    program = reduced(traced(Toy(Block(), Block())), "tome", r=2)
    before, outputs = str(program.graph), program.run(images(2))
    to_onnx(program, precision="fp16")
    assert str(program.graph) == before
    after = program.run(images(2))
    assert all(torch.equal(outputs[name], after[name]) for name in outputs)
    assert isinstance(proto(program), onnx.ModelProto)
