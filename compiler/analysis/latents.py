"""Latent tokens: learned rows that are appended to a sequence or ask as queries of a cross-attention.

1-D image tokenizers (TiTok, One-D-Piece, FlexTok) append them to the patches and read them alone
out; resamplers (Matryoshka Query Transformer, Perceiver) let them attend to image features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thresher.compiler.analysis.attention import SDPA, SOFTMAX
from thresher.compiler.analysis.axes import Axes, Use, infer
from thresher.compiler.analysis.flow import fed
from thresher.compiler.analysis.linears import stored_weights
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.operators import PRODUCTS, RESHAPES
from thresher.compiler.program import Program, Refusal, module_path

aten = torch.ops.aten
_BEFORE_SOFTMAX = (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, *RESHAPES)  # of logits
_SUMS = (SDPA, *SOFTMAX, *PRODUCTS, aten.sum.dim_IntList)  # as right for fewer latents as for all


@dataclass(frozen=True)
class Latents:
    """One group of latent tokens.

    Attributes:
        names: learned tensors ``[K, C]`` or ``[1, K, C]`` that make them, as they are stored.
        count: K.
        entry: where they first meet the data: a ``cat`` or an attention.
        sites: tokens of this group: ``sites.offsets`` are lengths less K of every axis that holds them last.
    """

    names: tuple[str, ...]
    count: int
    entry: fx.Node
    sites: Sites


def find_latents(program: Program) -> list[Latents]:
    """All groups, in the order of the graph; never raises."""
    axes, data = infer(program.graph), fed(program)
    found: dict[int, Latents] = {}
    for node, name in stored_weights(program).items():
        value = node.meta["val"]
        if not value.is_floating_point() or list(value.shape[:-2]) not in ([], [1]):
            continue
        if value.dim() < 2 or value.shape[-2] < 2:
            continue
        variable = axes.of(node)[-2]
        entry = _entry(axes, node, variable, data)
        if entry is not None:
            known = found.get(variable)
            names = (*known.names, name) if known else (name,)
            sites = known.sites if known else Sites(axes, token=variable)
            first = known.entry if known else entry
            found[variable] = Latents(names, value.shape[-2], first, sites)
    return list(found.values())


def objections(program: Program, latents: Latents, keep: int) -> list[Refusal]:
    """Why the first ``keep`` of a group cannot stay alone; empty if they can."""
    sites, gone = latents.sites, latents.count - keep
    found = [
        Refusal(
            node.name, f"input {name} has an entry for each latent, and inputs stay as they are"
        )
        for name, node in program.named_inputs()
        if sites.carries_tokens(node)
    ]
    if keep + min(sites.offsets.values()) < 1:
        found.append(
            Refusal(
                latents.entry.name, f"the model leaves out more than {keep} of the latents itself"
            )
        )
    for use in sites.axes.uses:
        why = _hindrance(sites, use, gone)
        if why is not None:
            where = module_path(use.node) or use.node.target
            found.append(
                Refusal(use.node.name, f"{use.node.name} ({where}) needs every latent: it {why}")
            )
    return found


def _hindrance(sites: Sites, use: Use, gone: int) -> str | None:
    """What a use of an axis that holds latents does that fewer of them would break."""
    variables = sites.axes.of(use.operand)
    if use.axis >= len(variables):
        return None
    variable = variables[use.axis]
    if variable not in sites.offsets:
        inside = use.kind == "mix" and _holds(sites, variable) and not _comes_apart(sites, use.node)
        return use.why if inside else None
    left = sites.axes.variables.size(variable) - gone
    if use.kind == "read":
        return None if use.index < left else f"reads entry {use.index}, and {left} would be left"
    if use.kind == "head" or (use.kind == "mix" and use.node.target is aten.slice.Tensor):
        return None if _before(sites, use, left) else "takes a part of it"
    if use.kind == "part" or (use.kind == "mix" and use.node.target not in _SUMS):
        return use.why
    return None


def _holds(sites: Sites, variable: int) -> bool:
    """Whether an axis is merged from several, latents among them."""
    return any(part in sites.offsets for part in sites.axes.variables.factors(variable) or ())


def _comes_apart(sites: Sites, node: fx.Node) -> bool:
    """Whether a reshape gives an axis of latents back as it was before it was merged."""
    return node.target in RESHAPES and bool(sites.token_axes(node))


def _before(sites: Sites, use: Use, left: int) -> bool:
    """Whether a slice ends before the latents that go."""
    if use.axis in sites.token_axes(use.node):
        return False
    _, _, start, end = (*use.node.args, None, None, None)[:4]
    return isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= left


def _entry(axes: Axes, weight: fx.Node, variable: int, data: set[fx.Node]) -> fx.Node | None:
    """Where rows of a weight become tokens, or None."""
    frontier, seen = [weight], {weight}
    while frontier:
        node = frontier.pop(0)
        for user in node.users:
            if user in data and _enters(axes, node, user, variable):
                return user
            if user not in seen | data and _carries(axes, user, variable):
                seen.add(user)
                frontier.append(user)
    return None


def _carries(axes: Axes, node: fx.Node, variable: int) -> bool:
    return axes.has(node) and variable in axes.of(node)


def _enters(axes: Axes, node: fx.Node, user: fx.Node, variable: int) -> bool:
    """Whether ``user`` takes tokens that are not data in among data: appends them or lets them ask."""
    if user.target is aten.cat.default:
        dim = int(user.args[1]) if len(user.args) > 1 else 0  # type: ignore[arg-type]
        return axes.of(node)[dim] == variable
    if user.target is SDPA or user.target in PRODUCTS:
        asks = user.args[0] is node
        return asks and axes.of(node)[-2] == variable and (user.target is SDPA or _is_weighed(user))
    return False


def _is_weighed(product: fx.Node) -> bool:
    """Whether a product is what a softmax is taken of."""
    return any(
        user.target in SOFTMAX or (user.target in _BEFORE_SOFTMAX and _is_weighed(user))
        for user in product.users
    )
