"""Which feed-forward networks can become adaptive modules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx

from thresher.compiler.analysis.ffn import FFN, Found, find, refuse
from thresher.compiler.analysis.linears import bias_of, stored_weights
from thresher.compiler.program import Program, Refusal


def adaptable(program: Program, parts: int, called: str = "learners") -> Found:
    """Networks that so many parts can share evenly, numbered anew, and why others are left alone.

    ``called`` is the option that says how many.
    """
    found, stored = find(program), stored_weights(program)
    fits, refused = list[FFN](), list(found.refusals)
    for ffn in found.ffns:
        problem = _problem(ffn, stored, parts, called)
        if problem is None:
            fits.append(replace(ffn, layer=len(fits)))
        else:
            refused.append(problem)
    return Found(fits, refused)


def _problem(ffn: FFN, stored: Collection[fx.Node], parts: int, called: str) -> Refusal | None:
    if ffn.form is None:
        return refuse(ffn.down, "has an activation that adaptive modules do not know")
    if ffn.x is None:
        return refuse(ffn.down, "has linears that read different tensors")
    x, y = ffn.x.meta["val"], ffn.down.meta["val"]
    if x.dim() != 3 or x.shape[-1] != y.shape[-1]:
        return refuse(ffn.down, "is no map of tokens [B, N, D] to such")
    for linear in (*ffn.linears, ffn.down):
        bias = bias_of(linear)
        if bias is not None and bias not in stored:
            return refuse(linear, f"has a bias that is computed ({bias.name})")
    if ffn.width % parts:
        return refuse(
            ffn.down,
            f"has {ffn.width} neurons, which {parts} {called} cannot share: set {called} to a divisor",
        )
    return None
