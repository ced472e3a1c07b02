"""What token reduction should compute, without ever shortening the token axis.

The original eager model runs in float64 on all N tokens while a function mode changes three of
its operations:

* attention.  A dropped token is masked out as a key.  The members of a merged group hold the same
  value and act, as queries and keys, from the position of their destination (rows of q and k, rows
  and columns of the bias are those of the destination); every real member is a key, and k equal
  keys are one key with log k added to its logit.  Padding is never a key.
* the write to the residual stream that follows attention (the add, or the LayerNorm behind it in
  post-norm models).  There the decisions are taken and values are overwritten: a group by its mean
  over real members, dropped tokens by the value they had when they were dropped.
* the mean over tokens, and a softmax over them that pools: only over tokens that are left.

DiffRate's sizes are no numbers of tokens: there one key stands for a group, with its log size on
the logit, and the mean is weighted by the sizes.

A fused token (EViT) lives in the slot, and so at the position, of the best-scored token that its
layer drops.  Per-token outputs need that slot back, so they come from a second run that restores
it at the last write.

Nothing here uses the compiler.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .decisions import Method, Score, hash_score
from .entry import Entry
from .mode import LayerMap, Reduction


@dataclass(frozen=True)
class Reduced:
    """Outputs in float64, one map per layer, and the mask of real tokens ``[B, N]``.

    Rows of per-token outputs at padding are undefined.
    """

    outputs: dict[str, Tensor]
    layers: list[LayerMap]
    real: Tensor

    @property
    def tokens(self) -> list[int]:
        """Tokens after each layer."""
        return [len(layer.sequence[0]) for layer in self.layers]


def reduced_outputs(
    entry: Entry,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    method: Method,
    counts: Sequence[int] | None,
    *,
    score: Score | None = None,
    proportional: bool = True,
    fuse: bool = False,
    mlerp: bool = False,
    prefix: int | None = None,
) -> Reduced:
    """Run a model as if its tokens had been reduced.

    Args:
        entry: what is known about the model.
        model: ``entry.build()[0]``; left untouched.
        inputs: forward keyword -> tensor.
        method: "tome", "evit", "topk-norm", "random", "max-min", "pitome", "atm" (by size at every
            block) or "diffrate" (which prunes half of what goes where the entry has a class token,
            and merges everything where not).
        counts: tokens after each layer, prefix and fused token included; None reduces nothing.
            A count at or above the current one leaves the layer alone.
        score: of the "random" method; by default the hash with base seed 0.
        proportional: whether attention counts every member of a merged group.
        fuse: "evit" only: the dropped tokens are summed, weighted by score, into one more token.
        mlerp: "tome" only: a mean gets the length of the longest of its members.
        prefix: overrides the entry's number of protected tokens.
    """
    if method == "evit" and entry.class_token is None:
        raise ValueError(f"{entry.name} reads no class token, so evit has no score")
    model = copy.deepcopy(model).double().eval()
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    real = None if entry.real is None else entry.real(model, inputs)

    def run(reveal: int | None = None) -> tuple[dict[str, Tensor], Reduction]:
        mode = Reduction(
            method=method,
            counts=None if counts is None else list(counts),
            prefix=entry.prefix if prefix is None else prefix,
            class_token=entry.class_token,
            post_norm=entry.post_norm,
            score=score or hash_score(),
            proportional=proportional,
            fuse=fuse,
            mlerp=mlerp,
            padding_mask=real,
            reveal=reveal,
        )
        with torch.no_grad(), mode:
            outputs = model(**doubled)
        return outputs, mode

    outputs, mode = run()
    if len(mode.maps) != entry.layers:
        raise AssertionError(f"{entry.name}: {len(mode.maps)} attention layers were seen")
    if fuse and entry.dense:
        revealed, _ = run(reveal=mode.writes)
        outputs = {k: revealed[k] if k in entry.dense else v for k, v in outputs.items()}
    return Reduced(outputs, mode.maps, mode.real)
