"""The search forward of DiffRate: a Program run with tokens masked instead of removed.

Every token stays in its place, so one graph serves every choice of counts; attention, pooling and
ranking ignore tokens that are masked, and the masks carry gradients to the counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from thresher.compiler.analysis.attention import SDPA, Attention
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.operators import in_any_layout
from thresher.compiler.program import Program
from thresher.passes.tokens.sizes import MASKED, size_weighted, size_weighted_shares, visible


@dataclass(frozen=True)
class Policy:
    """What one site does to the ranked unprotected tokens.

    ``pruned`` and ``kept`` count those left after pruning and after merging; ``mask`` ``[patches]``
    is 1 for the ranks that stay (see :mod:`survival`).
    """

    pruned: int
    kept: int
    mask: Tensor


class MaskedForward(fx.Interpreter):
    """Runs a Program under one Policy per site; weights are frozen.

    Masked tokens are seen by themselves alone: softmax over ``exp(logit) m_j`` with ``m_i = 1`` for
    the query's own token, renormalised.
    """

    def __init__(self, program: Program, sites: Sites) -> None:
        super().__init__(program.exported.graph_module)
        self.program, self.sites = program, sites
        self._by_attention = {site.attention.node: site for site in sites.sites}
        self._by_stream = {site.stream: site for site in sites.sites}
        self._policies: Mapping[int, Any] = {}
        self._alive: Tensor | None = None
        self._size: Tensor | None = None
        self._score: Tensor | None = None

    def outputs(
        self, inputs: Mapping[str, Tensor], policies: Mapping[int, Any]
    ) -> dict[str, Tensor]:
        """Outputs by name; ``policies`` by block number, blocks without one keep all tokens.

        A policy is whatever :meth:`reduce` takes, a :class:`Policy` here.
        """
        self._policies, self._alive, self._size, self._score = policies, None, None, None
        results: Sequence[Tensor] = self.run(*self.program.placeholder_values(inputs))
        names = [spec.name for spec in self.program.outputs]
        return dict(zip(names, results, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        """One node: attention, pooling and the sites' residual adds under masks, others as they are."""
        if self._attends(n):
            return self._attend(n)
        if self._pools(n):
            return self._pool(n)
        value = super().run_node(n)
        if n in self.sites.shares and self._alive is not None:
            ((axis, offset),) = self.sites.token_axes(n).items()
            return size_weighted_shares(value, self._sizes() * self._alive, axis, -offset)
        if n is self.sites.padding:
            self._size = visible(value)
            self._alive = (self._size > 0).float()
        site = self._by_stream.get(n)
        policy = self._policies.get(site.layer) if site is not None else None
        return value if policy is None else self.reduce(value, policy)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``view`` runs as ``reshape``: attention under masks has another memory layout."""
        return super().call_function(in_any_layout(target), args, kwargs)

    # --- attention ----------------------------------------------------------------------------

    def _attends(self, node: fx.Node) -> bool:
        if node.target is not SDPA or not self.sites.carries_tokens(Attention(node).k):
            return False
        site = self._by_attention.get(node)
        return self._alive is not None or (site is not None and site.layer in self._policies)

    def _attend(self, node: fx.Node) -> Tensor:
        attention = Attention(node)
        args, _ = self.fetch_args_kwargs_from_env(node)
        query, key, value = args[:3]
        logits = _wide(query) @ _wide(key).transpose(-1, -2) * attention.scale
        if attention.mask is not None:
            logits = logits + _additive(self.env[attention.mask])
        if self._alive is not None:
            logits = logits + self._keys(attention, self._sizes()).clamp(min=1.0).log()
        weights = (logits - logits.amax(-1, keepdim=True).detach()).exp()
        if self._alive is not None:
            weights = weights * self._visible(attention, weights)
        weights = weights / weights.sum(-1, keepdim=True)
        site = self._by_attention.get(node)
        if site is not None and site.layer in self._policies:
            self._score = self._importance(weights.detach())
        mixed: Tensor = weights.to(value.dtype) @ value
        return mixed

    def _keys(self, attention: Attention, per_token: Tensor) -> Tensor:
        """``[B, N] -> [B, 1, 1, keys]``, without a prefix that the keys lack."""
        axes = self.sites.token_axes(attention.k)
        cut = -next(iter(axes.values()))
        return per_token[:, None, None, cut:]

    def _visible(self, attention: Attention, weights: Tensor) -> Tensor:
        assert self._alive is not None
        policy = self._keys(attention, self._alive)
        queries_are_tokens = self.sites.carries_tokens(attention.q)
        if queries_are_tokens and weights.shape[-1] == weights.shape[-2]:
            policy = policy + (1 - policy) * torch.eye(weights.shape[-1])
        return policy

    def _importance(self, weights: Tensor) -> Tensor:
        """``[B, N]``: the class token's attention, or what each token receives, meaned over heads."""
        if self.sites.class_token is not None:
            return weights[:, :, self.sites.class_token].mean(1)
        if self._alive is None:
            return weights.mean((1, 2))
        seen = self._alive.detach()[:, None, :, None]
        return (weights * seen).sum(2).mean(1) / self._alive.detach().sum(1, keepdim=True)

    # --- pruning and merging ------------------------------------------------------------------

    def reduce(self, x: Tensor, policy: Any) -> Tensor:
        """What a site does to the stream and to the masks."""
        assert self._score is not None
        if self._alive is None:
            self._alive = torch.ones(x.shape[:2], dtype=policy.mask.dtype)
        prefix = self.sites.protected
        with torch.no_grad():
            rank = _rank(self._score, self._alive, prefix)
            stays = (rank >= prefix) & (rank < prefix + policy.kept)
            joins = (rank >= prefix + policy.kept) & (rank < prefix + policy.pruned)
            unit = torch.nn.functional.normalize(_wide(x), dim=-1, eps=1e-12)
            pairs = _pairs(unit, stays, joins & (self._alive > 0))
        partner = pairs @ x
        cosine = torch.nn.functional.cosine_similarity(_wide(x), _wide(partner), dim=-1, eps=1e-12)
        size = self._sizes()
        grown = size + (pairs * (cosine * size)[..., None]).sum(1)
        self._size = torch.where(size > 0, grown.clamp(min=1.0), size)
        members = pairs.sum(1)[..., None]
        x = torch.where(members > 0, (x + pairs.transpose(1, 2) @ x) / (1 + members), x)
        ranked = torch.cat([torch.ones(prefix), policy.mask])
        self._alive = self._alive * ranked[rank]
        return x

    def _sizes(self) -> Tensor:
        assert self._alive is not None
        return torch.ones_like(self._alive) if self._size is None else self._size

    # --- pooling ------------------------------------------------------------------------------

    def _pools(self, node: fx.Node) -> bool:
        return self._alive is not None and self.sites.pools(node)

    def _pool(self, node: fx.Node) -> Tensor:
        assert self._alive is not None
        args, _ = self.fetch_args_kwargs_from_env(node)
        axis, prefix, keep = self.sites.pooling(node)
        return size_weighted(args[0], self._sizes() * self._alive, axis, prefix, keep)


def _rank(score: Tensor, alive: Tensor, prefix: int) -> Tensor:
    """``[B, N]``: the prefix first, then by falling score, masked tokens last; ties by index."""
    score = torch.where(alive > 0, score, -1.0)
    score[:, :prefix] = torch.inf
    order = score.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def _pairs(unit: Tensor, stays: Tensor, joins: Tensor) -> Tensor:
    """``[B, N, N]`` 1 where token i joins token j, the most similar one that stays."""
    cosine = unit @ unit.transpose(1, 2)
    into = torch.where(stays[:, None, :], cosine, -2.0).argmax(-1)
    pairs = torch.nn.functional.one_hot(into, unit.shape[1]).to(unit.dtype) * joins[..., None]
    return pairs * stays.any(1)[:, None, None]


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _additive(bias: Tensor) -> Tensor:
    return torch.where(bias, 0.0, MASKED) if bias.dtype == torch.bool else _wide(bias)
