"""The site finder: where tokens may go, and the reason where they may not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.compiler.toys import TOKENS, WIDTH, Block, TokenConv, Toy, traced
from thresher.compiler.analysis.finder import find_sites


def test_plain_encoder_has_one_site_per_block() -> None:
    found = find_sites(traced(Toy(Block(), Block(), Block())))
    assert [site.layer for site in found.sites] == [0, 1, 2]
    assert found.refusals == []
    assert (found.tokens, found.protected, found.class_token) == (TOKENS + 1, 1, 0)


def test_mean_pool_without_class_token_protects_nothing() -> None:
    found = find_sites(traced(Toy(pool="mean")))
    assert (found.tokens, found.protected, found.class_token) == (TOKENS, 0, None)


def test_dense_output_needs_every_token_late() -> None:
    found = find_sites(traced(Toy(pool="dense")))
    assert len(found.sites) == 2
    assert [n.op for n in found.late] == ["output"]


def test_causal_attention_is_refused_with_its_node() -> None:
    found = find_sites(traced(Toy(Block(causal=True))))
    assert found.sites == []
    assert found.refusals[0].node == "scaled_dot_product_attention"
    assert "causal" in found.refusals[0].reason


def test_convolution_over_tokens_refuses_the_sites_before_it() -> None:
    found = find_sites(traced(Toy(Block(mixer=TokenConv()), Block(), Block())))
    assert [site.layer for site in found.sites] == [1, 2]
    (refusal,) = found.refusals
    assert "conv1d" in refusal.reason
    assert "convolution" in refusal.reason


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
def test_latents_that_are_read_may_stand_before_the_patches_only(behind: bool) -> None:
    found = find_sites(traced(Latents(behind)))
    if behind:
        assert found.sites == []
        assert found.root is None  # nor may tokens skip blocks
        assert f"{TOKENS} of {TOKENS + LATENTS} tokens" in found.refusals[0].reason
    else:
        assert (len(found.sites), found.protected) == (2, LATENTS)


LATENTS = 4


class Latents(nn.Module):
    """A tokenizer: latents beside the patches, which alone are read."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.behind = behind
        self.latents = nn.Parameter(torch.randn(1, LATENTS, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        x = self.blocks(torch.cat([x, latents] if self.behind else [latents, x], 1))
        return x[:, -LATENTS:] if self.behind else x[:, :LATENTS]


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


def test_no_attention_is_refused() -> None:
    found = find_sites(traced(NoAttention()))
    assert found.sites == []
    assert "not a transformer" in found.refusals[0].reason


def test_dynamic_length_keeps_its_symbol() -> None:
    found = find_sites(traced(Toy(), dynamic=True))
    assert isinstance(found.tokens, torch.SymInt)
    assert len(found.sites) == 2


@pytest.mark.parametrize("blocks", [1, 4])
def test_token_axes_of_every_stream_tensor(blocks: int) -> None:
    program = traced(Toy(*(Block() for _ in range(blocks))))
    found = find_sites(program)
    for site in found.sites:
        assert found.token_axes(site.stream) == {1: 0}
        assert found.token_axes(site.attention.q) == {2: 0}
        assert found.token_axes(site.attention.k) == {2: 0}
