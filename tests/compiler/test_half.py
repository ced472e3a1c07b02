"""Half precision: types by what operators declare, islands, and bfloat16 as the CUDA provider takes it."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import fx, nn

from tests.compiler.lowered import error, on_onnxruntime
from tests.compiler.toys import TOKENS, WIDTH, Toy, traced
from tests.kernels.back_ends import model as one_node
from thresher.compiler.contract import Context
from thresher.compiler.errors import RefusedError
from thresher.compiler.lowering.onnx_export import to_onnx
from thresher.compiler.lowering.precision import FLOAT32, HALF, declared, our_operator
from thresher.compiler.lowering.prepare import prepare
from thresher.compiler.lowering.widen import widen
from thresher.compiler.program import Program
from thresher.kernels.registry import BY_TORCH_NAME, OPERATORS
from thresher.passes.tokens.methods import Evit
from thresher.runtime.backends import backend
from thresher.runtime.backends.bfloat16 import without_kernel

ops = torch.ops.thresher
ONNX_TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
BFLOAT16 = "tensor(bfloat16)"
ROUNDINGS = 4  # of results that end in float32; a norm or a class token lies behind most of them


class Operators(nn.Module):
    """Every operator; each of its float operands comes out of a product (half) or a norm (float32)."""

    def __init__(self, wide: tuple[bool, ...]) -> None:
        super().__init__()
        self.wide = wide
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)
        self.learners = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / WIDTH)
        self.biases = nn.Parameter(torch.randn(2, WIDTH))
        self.gate = nn.Parameter(torch.randn(3, WIDTH))
        self.threshold = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        wide: torch.Tensor = self.norm(x)
        narrow: torch.Tensor = self.linear(x)
        turn = itertools.cycle(self.wide)

        def tokens() -> torch.Tensor:
            return wide if next(turn) else narrow

        def column() -> torch.Tensor:
            return tokens()[..., 0]

        def heads() -> torch.Tensor:
            return tokens().reshape(x.shape[0], -1, 2, WIDTH // 2).transpose(1, 2)

        index = torch.arange(TOKENS).expand(x.shape[0], -1)
        w, few = self.weight, 10**6
        learners, biases = self.learners, self.biases
        down = learners, biases[0]
        merged = ops.bipartite_merge(tokens(), column().abs(), heads(), 7, 1, True)
        kept = ops.keep_tokens(tokens(), column(), 7, 1, True)
        pruned = ops.prune_merge(tokens(), column().abs(), column(), 8, 7, 1)
        found = [
            *merged[:2],
            *ops.bipartite_merge(tokens(), column().abs(), heads(), 7, 1, False)[:2],
            *ops.redundant_merge(tokens(), column().abs(), heads(), column(), 7, 1)[:2],
            *ops.split_merge(tokens(), column().abs(), heads(), column(), 7, 1)[:2],
            ops.select_diverse(tokens(), column().abs(), 7, 1)[0],
            ops.soft_merge(tokens(), tokens(), tokens()[..., :6], 1)[0],
            kept[0],
            ops.keep_tokens(tokens(), column(), 7, 1, False)[0],
            *pruned[:2],
            ops.class_attention(heads(), heads(), column()[:, None, None], 0.5, 0),
            ops.class_attention(heads(), heads(), tokens()[:, None, :, :TOKENS] > 0, 0.5, 0),
            ops.token_energy(heads(), column().abs(), 0.5, 1),
            ops.gather_tokens(tokens(), index),
            ops.gather_tokens(index, index),
            ops.restore_tokens(kept[0], kept[1], tokens()),
            ops.adaptive_gate(tokens(), self.gate, self.gate[:, 0]),
            ops.adaptive_mlp(tokens(), index, learners, biases, *down, "gelu"),
            ops.expert_mlp(tokens(), tokens()[..., :2] > 0, learners, biases, *down, "gelu"),
            ops.sparse_linear(tokens(), w, self.threshold, few),
            ops.sparse_gated_ffn(tokens(), w, w, w, self.threshold, "silu", few),
            ops.adaptive_gated_mlp(tokens(), index, *(learners, biases) * 2, *down, "silu"),
        ]
        return [each.float() if each.is_floating_point() else each for each in found]


VARIANTS = {
    "CompactSparseLinear",
    "SparseLinearBf16",
    "SparseGeGLU",
    "SparseReGLU",
    "SparseSwiGLUBf16",
    "SparseGeGLUBf16",
    "SparseReGLUBf16",
}  # of one torch operator
MIXES = [(True,), (True, False), (False, True, True)]


@pytest.fixture(scope="module", params=MIXES, ids=lambda mix: "".join("nw"[one] for one in mix))
def every(request: pytest.FixtureRequest) -> Program:
    torch.manual_seed(0)
    return traced(Operators(request.param))


def calls(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if our_operator(node)]


@pytest.mark.parametrize("precision", HALF)
def test_operands_have_the_types_that_their_operator_declares(
    every: Program, precision: str
) -> None:
    half = HALF[precision]
    found = calls(prepare(every, precision))
    assert {operator.torch_name for node in found if (operator := our_operator(node))} == set(
        BY_TORCH_NAME
    )
    for node in found:
        operator = our_operator(node)
        assert operator is not None
        types: dict[str, set[torch.dtype]] = {}
        for _, value, kind in declared(node, operator):
            if isinstance(value, fx.Node):
                types.setdefault(kind, set()).add(value.meta["val"].dtype)
        assert types.get(FLOAT32, {torch.float32}) <= {torch.float32, torch.bool}
        assert len(types["T"]) == 1
        if operator.product:
            assert types["T"] == {half}


@pytest.mark.parametrize("mix", [MIXES[1], pytest.param(MIXES[2], marks=pytest.mark.slow)])
def test_every_operator_in_half_precision_runs(mix: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    program = traced(Operators(mix))
    feeds = {"x": torch.randn(2, TOKENS, WIDTH)}
    for precision in HALF:
        made = to_onnx(program, precision=precision)
        model = ir.to_proto(made)
        onnx.checker.check_model(model, full_check=True)
        found = {n.op_type.partition("_")[0] for n in model.graph.node}  # without the attributes
        assert found >= set(OPERATORS) - VARIANTS
        if precision == "bf16":
            widen(made)
            model = ir.to_proto(made)
        for name, value in on_onnxruntime(model, feeds).items():
            assert np.isfinite(value).all(), name


class Seeing(nn.Module):
    """A toy behind a convolution, which has no bfloat16 kernel, and in front of a clamp, which has none either."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.toy = Toy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.toy(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return y.clamp(-3, 3)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.fixture(scope="module")
def seeing() -> Program:
    torch.manual_seed(0)
    program = traced(Seeing())
    return Evit(Evit.Options(keep=0.7))(program, Context()).program


@pytest.mark.parametrize("precision", HALF)
def test_products_are_half_and_what_needs_resolution_is_not(
    seeing: Program, precision: str
) -> None:
    model = ir.to_proto(to_onnx(seeing, precision=precision))
    types, half = types_of(model), ONNX_TYPES[precision]
    reads: dict[str, set[int]] = {}
    for node in model.graph.node:
        floats = {types.get(name, 0) for name in node.input} & {half, onnx.TensorProto.FLOAT}
        reads.setdefault(node.op_type, set()).update(floats)
    assert reads["MatMul"] == {half}
    assert reads["Softmax"] == reads["LayerNormalization"] == {onnx.TensorProto.FLOAT}
    narrow = {half if precision == "fp16" else onnx.TensorProto.FLOAT}
    assert reads["Conv"] == narrow
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {1}


def test_bfloat16_is_what_the_reference_evaluator_computes(seeing: Program) -> None:
    """ONNX's own evaluator has every operator in bfloat16; the float32 form has to agree with it."""
    made = to_onnx(seeing, precision="bf16")
    model = ir.to_proto(made)
    onnx.checker.check_model(model, full_check=True)
    assert backend("cuda").problems(model) == []
    feeds = {"x": torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))}
    (expected,) = ReferenceEvaluator(model).run(None, {"x": feeds["x"].numpy()})
    widen(made)
    wide = ir.to_proto(made)
    found = on_onnxruntime(wide, feeds)
    scale = np.abs(expected).max()
    assert np.abs(found["output"] - expected).max() < ROUNDINGS * 2.0**-8 * scale
    assert 2.0**-12 < error(found, seeing, feeds) < 16 * 2.0**-7
    narrow = {n for n, kind in types_of(wide).items() if kind == onnx.TensorProto.BFLOAT16}
    readers = {n.op_type for n in wide.graph.node if narrow.intersection(n.input)}
    assert readers == {"Cast"}, "only casts know bfloat16"


RANKS = {
    "adaptive_gate": (3, 2, 1),
    "bipartite_merge": (3, 2, 4, 1),
    "redundant_merge": (3, 2, 4, 2, 1),
    "split_merge": (3, 2, 4, 2, 1),
    "token_energy": (4, 2),
}
ATTRIBUTES: dict[type, Any] = {int: 2, float: 1.0, str: "gelu"}
PADDED = ("AdaptiveMLP", "AdaptiveGatedMLP")  # the CUDA provider has no bfloat16 Pad


def body_in_bfloat16(name: str) -> onnx.ModelProto:
    operator = OPERATORS[name]
    ranks = RANKS.get(operator.torch_name, (3,) * len(operator.inputs))
    attributes = {key: ATTRIBUTES[kind] for key, kind in operator.attributes.items()}
    return one_node(name, ranks, "bfloat16", tuple(attributes.items()))


@pytest.mark.parametrize("name", [n for n, o in OPERATORS.items() if BFLOAT16 in o.types])
def test_bodies_keep_to_the_kernels_of_the_provider(name: str) -> None:
    lacking = {node.op_type for node, _ in without_kernel(body_in_bfloat16(name))}
    assert lacking == ({"Pad"} if name in PADDED else set())


@pytest.mark.parametrize("name", PADDED)
def test_a_body_without_a_kernel_is_refused_by_name(name: str) -> None:
    with pytest.raises(RefusedError, match=rf"the body of thresher::{name}\): .*no bfloat16 Pad"):
        backend("cuda").refuse_problems(body_in_bfloat16(name))
