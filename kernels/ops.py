"""The operators in torch: ``torch.ops.thresher.*``, registered by importing this module.

Each runs its reference, on a CUDA device its Triton kernels where there are any, has a shape function
for symbolic sizes, and is differentiable: the backward pass recomputes the reference and differentiates
that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thresher.kernels.adaptive_gate import reference as _adaptive_gate
from thresher.kernels.adaptive_gated_mlp import reference as _adaptive_gated_mlp
from thresher.kernels.adaptive_mlp import reference as _adaptive_mlp
from thresher.kernels.bipartite_merge import reference as _merge
from thresher.kernels.class_attention import reference as _class_attention
from thresher.kernels.expert_mlp import reference as _expert_mlp
from thresher.kernels.gather_tokens import reference as _gather
from thresher.kernels.gpu.dispatch import on_gpu
from thresher.kernels.keep_tokens import reference as _keep
from thresher.kernels.prune_merge import reference as _prune_merge
from thresher.kernels.redundant_merge import reference as _redundant
from thresher.kernels.restore_tokens import reference as _restore
from thresher.kernels.select_diverse import reference as _diverse
from thresher.kernels.soft_merge import reference as _soft
from thresher.kernels.sparse_gated_ffn import reference as _sparse_gated_ffn
from thresher.kernels.sparse_linear import reference as _sparse_linear
from thresher.kernels.split_merge import reference as _split
from thresher.kernels.token_energy import reference as _token_energy

NAMESPACE = "thresher"
Function = Callable[..., Any]


def _register(reference: Function, fake: Function, schema: str) -> None:
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{reference.__name__}", reference, mutates_args=(), schema=schema
    )
    operator.register_kernel("cuda")(on_gpu(reference))
    operator.register_fake(fake)
    operator.register_autograd(_backward(reference), setup_context=_remember)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _backward(reference: Function) -> Function:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved).detach() if other is None else other[0] for other in ctx.others]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        for i in wanted:
            inputs[i].requires_grad_()
        with torch.enable_grad():
            outputs = reference(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
        ]
        found: tuple[Tensor | None, ...] = (
            torch.autograd.grad(
                [o for o, _ in pairs],
                [inputs[i] for i in wanted],
                [g for _, g in pairs],
                allow_unused=True,
            )
            if pairs
            else (None,) * len(wanted)
        )
        result: list[Tensor | None] = [None] * len(inputs)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = grad
        return tuple(result)

    return backward


_register(
    _merge.bipartite_merge,
    _merge.fake,
    "(Tensor x, Tensor size, Tensor metric, SymInt keep, int protected, bool by_index)"
    " -> (Tensor y, Tensor out_size, Tensor slot, Tensor kept)",
)
_register(
    _class_attention.class_attention,
    _class_attention.fake,
    "(Tensor q, Tensor k, Tensor? bias, float scale, int row) -> Tensor",
)
_register(
    _keep.keep_tokens,
    _keep.fake,
    "(Tensor x, Tensor score, SymInt keep, int protected, bool fuse)"
    " -> (Tensor y, Tensor slot, Tensor kept)",
)
_register(
    _prune_merge.prune_merge,
    _prune_merge.fake,
    "(Tensor x, Tensor size, Tensor score, SymInt pruned, SymInt keep, int protected)"
    " -> (Tensor y, Tensor out_size, Tensor slot, Tensor kept)",
)
_register(_gather.gather_tokens, _gather.fake, "(Tensor x, Tensor index) -> Tensor")
_register(_restore.restore_tokens, _restore.fake, "(Tensor x, Tensor slot, Tensor aside) -> Tensor")
_register(
    _adaptive_gate.adaptive_gate,
    _adaptive_gate.fake,
    "(Tensor x, Tensor gate, Tensor bias) -> Tensor",
)
_register(
    _adaptive_mlp.adaptive_mlp,
    _adaptive_mlp.fake,
    "(Tensor x, Tensor k, Tensor w1, Tensor b1, Tensor w2, Tensor b2, str activation) -> Tensor",
)
_register(
    _adaptive_gated_mlp.adaptive_gated_mlp,
    _adaptive_gated_mlp.fake,
    "(Tensor x, Tensor k, Tensor w1, Tensor b1, Tensor v, Tensor c, Tensor w2, Tensor b2,"
    " str activation) -> Tensor",
)
_register(
    _expert_mlp.expert_mlp,
    _expert_mlp.fake,
    "(Tensor x, Tensor run, Tensor w1, Tensor b1, Tensor w2, Tensor b2, str activation) -> Tensor",
)
_register(
    _diverse.select_diverse,
    _diverse.fake,
    "(Tensor x, Tensor size, SymInt keep, int protected) -> (Tensor y, Tensor slot, Tensor kept)",
)
_register(
    _token_energy.token_energy,
    _token_energy.fake,
    "(Tensor metric, Tensor size, float margin, int protected) -> Tensor",
)
_register(
    _redundant.redundant_merge,
    _redundant.fake,
    "(Tensor x, Tensor size, Tensor metric, Tensor score, SymInt keep, int protected)"
    " -> (Tensor y, Tensor out_size, Tensor slot, Tensor kept)",
)
_register(
    _split.split_merge,
    _split.fake,
    "(Tensor x, Tensor size, Tensor metric, Tensor score, SymInt keep, int protected)"
    " -> (Tensor y, Tensor out_size, Tensor slot, Tensor kept)",
)
_register(
    _soft.soft_merge,
    _soft.fake,
    "(Tensor x, Tensor values, Tensor logits, int protected)"
    " -> (Tensor y, Tensor slot, Tensor kept)",
)
_register(
    _sparse_linear.sparse_linear,
    _sparse_linear.fake,
    "(Tensor x, Tensor weight, Tensor threshold, int most_tokens, bool compact=False) -> Tensor",
)
_register(
    _sparse_gated_ffn.sparse_gated_ffn,
    _sparse_gated_ffn.fake,
    "(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor threshold, str activation,"
    " int most_tokens) -> Tensor",
)
