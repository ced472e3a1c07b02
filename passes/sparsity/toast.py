"""ToaSt's channel importance: the mean size of a channel, by what the class token looks at where there is one.

ToaSt (2026), token channel selection, without the fine-tuning that its published accuracies had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from thresher.compiler.analysis.attention import SDPA, Attention
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.errors import RefusedError
from thresher.compiler.program import Program
from thresher.passes.learning.calibration import View
from thresher.passes.learning.tap import Tapped
from thresher.passes.tokens.score import layer_seed, random_score

FIRST, LAST = 0.02, 0.2  # shares of the tokens that are looked at, by layer
OWN = 2.0  # weight of the class token's own channels


def importance(program: Program, layers: Mapping[fx.Node, int], seed: int) -> View:
    """Rows ``[T, C]`` whose mean is what each channel is worth, for nodes ``[B, N, C]`` by layer.

    With a class token one row of an item, ``2 |x_cls| + mean_i A[cls, i] |x_i|`` over the other tokens,
    A the mean over heads of the last attention before.  Without one, ``|x_i|`` of tokens chosen
    at random, from 2 % of a batch's in the first layer to 20 % in the last.

    Raises:
        RefusedError: tokens were dropped or merged between an attention and a network behind it.
    """
    if find_sites(program).class_token is not None:
        _demand_same_tokens(program, tuple(layers))
        return _by_class
    last = max(1, *layers.values())

    def sampled(tapped: Tapped, node: fx.Node, value: Tensor) -> Tensor:
        rows, layer = tapped.rows(value), layers[node]
        count = -(-len(rows) * (FIRST + (LAST - FIRST) * layer / last) // 1)
        order = random_score(len(rows), layer_seed(seed, layer))[0].argsort(stable=True)
        return rows[order[: int(count)]].abs()

    return sampled


def _by_class(tapped: Tapped, node: fx.Node, value: Tensor) -> Tensor:
    sizes = value.to(torch.promote_types(value.dtype, torch.float32)).abs()
    paid, own = tapped.class_attention(), tapped.class_token
    others = torch.arange(value.shape[1]) != own
    seen = (paid[:, others, None] * sizes[:, others]).mean(1)
    return OWN * sizes[:, own] + seen


def _demand_same_tokens(program: Program, nodes: Sequence[fx.Node]) -> None:
    tokens, wanted = "", set(nodes)
    for node in program.graph.nodes:
        if node.target is SDPA:
            tokens = str(Attention(node).k.meta["val"].shape[2])
        elif node in wanted and str(node.meta["val"].shape[1]) != tokens:
            raise RefusedError(
                f"score toast weighs tokens by the class token's attention, and {node.name} has other"
                " tokens than the attention before it: run channels before tokens are reduced, or take"
                " score=magnitude"
            )
