"""Registers the operators with torch under the namespace ``thresher``; importing is enough.

Each has its reference as the implementation on every device, a shape function for symbolic
sizes, and gradients through the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from thresher.kernels.bipartite_merge import reference as bipartite_merge
from thresher.kernels.class_attention import reference as class_attention
from thresher.kernels.gather_tokens import reference as gather_tokens
from thresher.kernels.keep_tokens import reference as keep_tokens
from thresher.kernels.restore_tokens import reference as restore_tokens

NAMESPACE = "thresher"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _register(schema: str, reference: Callable[..., Any], shape: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shape, lib=_LIBRARY)
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", _backward(reference), setup_context=_remember, lib=_LIBRARY
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.tensors = [i for i, a in enumerate(inputs) if isinstance(a, torch.Tensor)]
    ctx.rest = [None if isinstance(a, torch.Tensor) else a for a in inputs]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))


def _backward(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Gradient by running the reference again with gradients on."""

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        arguments = list(ctx.rest)
        with torch.enable_grad():
            for i, saved in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                arguments[i] = saved.detach().requires_grad_(saved.is_floating_point())
            results = reference(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        found = torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        gradient = dict(zip(map(id, wanted), found, strict=True))
        return tuple(gradient.get(id(a)) for a in arguments)

    return backward


_register(
    "bipartite_merge(Tensor x, Tensor size, Tensor metric, SymInt keep, int protected, bool by_index)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    bipartite_merge.bipartite_merge,
    bipartite_merge.shape,
)
_register(
    "class_attention(Tensor q, Tensor k, Tensor? bias, float scale, int row) -> Tensor",
    class_attention.class_attention,
    class_attention.shape,
)
_register(
    "keep_tokens(Tensor x, Tensor score, SymInt keep, int protected, bool fuse) -> (Tensor, Tensor, Tensor)",
    keep_tokens.keep_tokens,
    keep_tokens.shape,
)
_register("gather_tokens(Tensor x, Tensor index) -> Tensor", gather_tokens.gather_tokens, gather_tokens.shape)
_register(
    "restore_tokens(Tensor x, Tensor slot, Tensor aside) -> Tensor",
    restore_tokens.restore_tokens,
    restore_tokens.shape,
)
