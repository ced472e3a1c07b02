"""From an optimised Program to the graph that is exported: attention written out, types made explicit.

Attention becomes MatMul, Softmax, MatMul: the form that ONNX Runtime's CPU kernels run fastest and
that every back end takes in every precision.  A bias of the logits (a mask, the sizes of merged tokens) is
added to them: of six forms tried on ONNX Runtime, only one more channel in q and k was faster, by
5 % of the attention, and back ends with a kernel for attention know the sum.  For float16 and
bfloat16 the weights are halved, and casts round the islands (:mod:`.precision`) are written into the graph; no
builder flag decides.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.attention import SDPA, Attention
from thresher.compiler.errors import RefusedError
from thresher.compiler.lowering.precision import (
    FLOAT32,
    HALF,
    PRODUCTS,
    declared,
    is_float,
    islands,
    operator_name,
    our_operator,
    wants_float32,
)
from thresher.compiler.operators import RESHAPES
from thresher.compiler.program import Program, module_path
from thresher.compiler.surgery import Rewriter
from thresher.kernels.registry import Operator

aten = torch.ops.aten
LOWERING = "lower"  # what the nodes made here are noted with
HIDDEN = -1e4  # logit of a masked key: finite in float16, zero after softmax
_CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
)  # of the tracer's, for one dtype


def prepare(program: Program, precision: str) -> Program:
    """The Program as it will be exported, in fp32, fp16 or bf16; inputs and outputs stay float32.

    Raises:
        RefusedError: an attention drops out, which inference does not; named with its node.
    """
    lowering = _Lowering(program, precision)
    return dataclasses.replace(program, exported=lowering.run())


class _Lowering:
    def __init__(self, program: Program, precision: str) -> None:
        self.program, self.half = program, HALF.get(precision)
        self.rewriter = Rewriter(program, LOWERING)
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.biases: dict[fx.Node | tuple[str, str], fx.Node] = {}
        self.islands = islands(program, precision) if self.half else frozenset()
        self.halved: dict[str, torch.Tensor] = {}

    def run(self) -> torch.export.ExportedProgram:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op != "output" and node.target not in _CHECKS:
                self.rewriter.at(node)
                self._call(node)
        outputs = [
            self._cast(self.rewriter.map[n], n.meta["val"].dtype)
            for n in self.program.output_nodes()
        ]
        return self.rewriter.finish(outputs, weights=self.halved)

    def _placeholder(self, node: fx.Node) -> None:
        tensor = self._weight(node)
        if (
            self.half
            and tensor is not None
            and is_float(node)
            and not all(user in self.islands or wants_float32(user, node) for user in node.users)
        ):
            spec = self._spec(node)
            half = tensor.detach().to(self.half)
            parameter = isinstance(tensor, torch.nn.Parameter)
            self.halved[spec.target] = torch.nn.Parameter(half, False) if parameter else half
            self.rewriter.weight(node, self.halved[spec.target])
        else:
            self.rewriter.copy(node)

    def _spec(self, node: fx.Node) -> Any:
        specs = self.program.exported.graph_signature.input_specs
        return next(s for s in specs if getattr(s.arg, "name", None) == node.name)

    def _weight(self, node: fx.Node) -> torch.Tensor | None:
        spec = self._spec(node)
        if spec.kind is InputKind.USER_INPUT:
            return None
        exported = self.program.exported
        stored: dict[str, Any] = {**exported.constants, **exported.state_dict}
        found: torch.Tensor | None = stored.get(spec.target)
        return found

    def _call(self, node: fx.Node) -> None:
        replace = self._operands(node)
        if node.target is SDPA:
            self._attention(node, replace)
        elif node.target in RESHAPES:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            whole = self.rewriter.emit(
                aten.clone.default,
                replace.get(source) or self.rewriter.map[source],
                memory_format=torch.contiguous_format,
            )
            shape = fx.node.map_arg(node.args[1], lambda n: self.rewriter.map[n])
            self.rewriter.call_like(node, (whole, shape), {}, aten.view.default)
        elif self.half and (operator := our_operator(node)):
            self._ours(node, operator, self.half)
        else:
            self.rewriter.copy(node, replace)

    def _ours(self, node: fx.Node, operator: Operator, half: torch.dtype) -> None:
        """Operands get the types that the operator declares: ``T`` is its first one's, or half in a product."""
        new = self.rewriter.map
        given = list(declared(node, operator))
        first = next(value for _, value, kind in given if kind == "T")
        tokens = half if operator.product else new[first].meta["val"].dtype
        wanted = {"T": tokens, FLOAT32: torch.float32}
        typed: dict[str, Any] = {
            name: self._cast(new[value], wanted[kind])
            if isinstance(value, fx.Node) and kind in wanted
            else fx.node.map_arg(value, lambda n: new[n])
            for name, value, kind in given
        }
        args = tuple(typed.pop(name) for name, _, _ in given[: len(node.args)])
        self.rewriter.call_like(node, args, typed)

    def _operands(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """Operands that need a cast: float32 in islands and behind them, half elsewhere."""
        name = operator_name(node)
        floats = [n for n in node.all_input_nodes if is_float(n)]
        if not self.half or name is None or not floats:
            return {}
        wide = all(self.rewriter.map[n].meta["val"].dtype == torch.float32 for n in floats)
        island = node in self.islands or (wide and name not in PRODUCTS)
        wanted = torch.float32 if island else self.half
        return {n: self._cast(self.rewriter.map[n], wanted) for n in floats}

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if node.meta["val"].dtype == dtype or not node.meta["val"].dtype.is_floating_point:
            return node
        if (node, dtype) not in self.casts:
            self.casts[node, dtype] = self.rewriter.emit(aten._to_copy.default, node, dtype=dtype)
        return self.casts[node, dtype]

    def _attention(self, node: fx.Node, replace: dict[fx.Node, fx.Node]) -> None:
        attention, options = Attention(node), _options(node)
        q, k, v = (
            replace.get(a) or self.rewriter.map[a] for a in node.args[:3] if isinstance(a, fx.Node)
        )
        if options.get("enable_gqa"):
            k, v = (self.rewriter.inline(_spread, x, q) for x in (k, v))
        scale = attention.scale

        def logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.matmul(q * scale, k.transpose(-1, -2))

        def weigh(logits: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # Widened by a cast of its own: what is asked of softmax, the exporter casts behind it.
            return torch.matmul(logits.to(torch.float32).softmax(dim=-1).to(v.dtype), v)

        def weigh_biased(logits: torch.Tensor, bias: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return weigh(logits.to(torch.float32) + bias, v)

        scores = self.rewriter.inline(logits, q, k)
        if options.get("is_causal"):
            result = self.rewriter.inline(weigh_biased, scores, self._causal(q, k), v)
        elif attention.mask is not None:
            result = self.rewriter.inline(weigh_biased, scores, self._bias(attention.mask), v)
        else:
            result = self.rewriter.inline(weigh, scores, v)
        self.rewriter.map[node] = result

    def _causal(self, q: fx.Node, k: fx.Node) -> fx.Node:
        """``[Nq, N]`` additive mask that hides the keys behind each query, made once per size."""
        size = (str(q.meta["val"].shape[-2]), str(k.meta["val"].shape[-2]))
        if size not in self.biases:
            self.biases[size] = self.rewriter.inline(_hide_later, q, k)
        return self.biases[size]

    def _bias(self, mask: fx.Node) -> fx.Node:
        """An additive float32 mask, made once per mask."""
        if mask not in self.biases:
            new = self.rewriter.map[mask]
            if new.meta["val"].dtype == torch.bool:
                self.biases[mask] = self.rewriter.inline(
                    lambda m: (~m).to(torch.float32) * HIDDEN, new
                )
            else:
                self.biases[mask] = self._cast(new, torch.float32)
        return self.biases[mask]


def _options(node: fx.Node) -> dict[str, Any]:
    names = ("dropout_p", "is_causal", "scale", "enable_gqa")
    options = dict(zip(names, node.args[4:], strict=False)) | node.kwargs
    if options.get("dropout_p"):
        raise RefusedError(
            f"{node.name} ({module_path(node) or 'attention'}) drops out with probability"
            f" {options['dropout_p']}: trace the model in evaluation mode"
        )
    return options


def _spread(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Keys or values of shared heads, once for every query head."""
    shared = q.shape[-3] // x.shape[-3]
    apart = x.unsqueeze(-3)
    return apart.expand(*x.shape[:-2], shared, *x.shape[-2:]).flatten(-4, -3)


def _hide_later(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    query, key = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
    return (key[None, :] > query[:, None]).to(torch.float32) * HIDDEN
