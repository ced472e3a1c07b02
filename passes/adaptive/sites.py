"""Where adaptive modules can stand: in place of feed-forward networks, and of projections of attention."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Protocol

from torch import fx

from thresher.compiler.analysis.ffn import FFN, Found, find, refuse
from thresher.compiler.analysis.linears import bias_of, stored_weights
from thresher.compiler.program import Program, Refusal


class Site(Protocol):
    """A part of a graph that maps tokens ``[B, N, D]`` to such: :class:`FFN` is one.

    Attributes:
        layer: its number among those that are converted, from 0.
        path: its name, no other's.
        x: what it reads.
        linears: those that read x.
        down: the node that writes its result.
        inner: nodes from ``linears`` to ``down``, which is none of them; nobody else reads them.
        weights: placeholders that it reads, each once.
        activation: a name among :data:`~thresher.kernels.activations.ACTIVATIONS`; None if it has none.
    """

    @property
    def layer(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def x(self) -> fx.Node | None: ...
    @property
    def linears(self) -> tuple[fx.Node, ...]: ...
    @property
    def down(self) -> fx.Node: ...
    @property
    def inner(self) -> frozenset[fx.Node]: ...
    @property
    def weights(self) -> tuple[fx.Node, ...]: ...
    @property
    def activation(self) -> str | None: ...


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
