"""How a model reads its tokens: the prefix that stays, and the nodes that need every token in its place."""

from __future__ import annotations

import networkx as nx
import torch
from torch import fx

from thresher.compiler.analysis.attention import SDPA, SOFTMAX, Attention
from thresher.compiler.analysis.axes import Axes, Use, size_of
from thresher.compiler.analysis.flow import fed
from thresher.compiler.analysis.sites import TOKEN_AXIS, Sites
from thresher.compiler.operators import PRODUCTS
from thresher.compiler.program import Program, Refusal, module_path

_SUMS = (*PRODUCTS, torch.ops.aten.sum.dim_IntList)


def prefix(found: Sites, flow: nx.DiGraph[fx.Node]) -> None:
    """Protected prefix and class token, from how the model builds and reads its tokens."""
    assert found.root is not None
    offsets = found.offsets
    behind = nx.descendants(flow, found.root) | {found.root}
    last = found.sites[-1].attention.node
    final = nx.descendants(flow, last)
    protected, reads = 0, []
    for use in found.axes.uses:
        offset = offsets.get(_variable(found.axes, use))
        if offset is None:
            continue
        if use.kind in ("head", "tail") and use.operand in behind:
            protected = max(protected, use.index + offset * -1 if offset < 0 else use.index)
        elif use.kind == "read" and use.node in final:
            reads.append(use.index)
            protected = max(protected, use.index + 1)
        elif use.kind == "part" and use.node not in behind | {found.root}:
            size = size_of(use.operand.meta["val"].shape[use.axis])
            protected = max(protected, size if isinstance(size, int) else 0)
    built = [-offset for offset in offsets.values() if offset < 0]
    found.protected = max([protected, *built])
    found.class_token = min(reads) if reads else _named_class_token(found, flow)


def _named_class_token(found: Sites, flow: nx.DiGraph[fx.Node]) -> int | None:
    """Index 0 when the first prefix token is a parameter that its model calls a class token."""
    offsets = found.offsets
    for use in found.axes.uses:
        if (
            use.kind == "part"
            and use.axis == TOKEN_AXIS
            and found.axes.of(use.node)[TOKEN_AXIS] in offsets
        ):
            sources = nx.ancestors(flow, use.operand) | {use.operand}
            if any("cls" in n.name or "class" in n.name for n in sources if n.op == "placeholder"):
                return 0
    return None


def ends_in_latents(program: Program, found: Sites) -> bool:
    """Whether learned tokens are appended to those of the data: they are what is read out."""
    data = fed(program)
    for use in found.axes.uses:
        if use.kind == "part" and found.axes.of(use.node)[use.axis] in found.offsets:
            *_, last = use.node.all_input_nodes
            if use.operand in data and last not in data:
                return True
    return False


def _variable(axes: Axes, use: Use) -> int:
    variables = axes.of(use.operand)
    return variables[use.axis] if use.axis < len(variables) else -1


def barriers(found: Sites, flow: nx.DiGraph[fx.Node]) -> None:
    """Nodes that need every token: refuse the sites they stand behind, or restore tokens late."""
    assert found.root is not None
    offsets = found.offsets
    behind = nx.descendants(flow, found.root) | {found.root}
    later = {s.attention.node for s in found.sites}
    found.shares, sums = _sequence_pooling(found, flow, behind, later)
    refused: dict[fx.Node, str] = {}
    for use in found.axes.uses:
        if use.operand not in behind or _variable(found.axes, use) not in offsets:
            continue
        if use.node in found.shares | sums:
            continue
        if use.kind == "output" or (use.kind == "mix" and use.node.target is not SDPA):
            if use.kind == "mix" and (nx.descendants(flow, use.node) & later):
                refused[use.node] = use.why
            else:
                found.late.add(use.node)
    for node, why in refused.items():
        upstream = nx.ancestors(flow, node)
        for site in [s for s in found.sites if s.stream in upstream]:
            found.sites.remove(site)
            found.refusals.append(
                Refusal(
                    site.stream.name,
                    f"{node.name} ({module_path(node) or node.target}) stands between this block and later"
                    f" attention and needs every token in place: it {why}",
                )
            )


def _sequence_pooling(
    found: Sites, flow: nx.DiGraph[fx.Node], behind: set[fx.Node], later: set[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Softmaxes over the tokens that only weigh sums over them, and those sums.

    Compact transformers (Hassani et al., 2021) read their tokens out so: ``softmax(x w)^T x``.
    """
    needs: dict[fx.Node, set[str]] = {}
    for use in found.axes.uses:
        if _variable(found.axes, use) in found.offsets:
            needs.setdefault(use.node, set()).add(use.kind)
    shares: set[fx.Node] = set()
    sums: set[fx.Node] = set()
    for node in behind:
        if node.target not in SOFTMAX or "mix" not in needs.get(node, ()):
            continue
        if len(found.token_axes(node)) > 1 or nx.descendants(flow, node) & later:
            continue
        reached, frontier = set(), list(node.users)
        while frontier:
            user = frontier.pop()
            if user not in needs and user.op != "output":
                frontier += user.users
            else:
                reached.add(user)
        if all(user.target in _SUMS for user in reached):
            shares.add(node)
            sums |= reached
    return shares, sums


def padding(program: Program, first: Attention) -> fx.Node | None:
    """The first attention's mask if the values of an input decide it: it says which tokens are padding."""
    mask = first.mask
    if mask is None or mask.meta["val"].dim() != 4:
        return None  # without a batch it says nothing of any one item
    return mask if mask in fed(program) else None
