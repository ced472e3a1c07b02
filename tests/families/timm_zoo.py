"""The timm half of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from .entry import Dynamic, Entry, images

_IMAGE: Dynamic = {"x": {0: "batch"}}
_CLASS: dict[str, Any] = {"prefix": 1, "class_token": 0}


class Image(nn.Module):
    """A timm model under the keyword ``x``; with ``tokens`` the features instead of the logits."""

    def __init__(self, model: Any, tokens: bool = False) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.tokens:
            return {"tokens": self.model.forward_features(x)}
        return {"logits": self.model(x)}


def _timm(name: str, tokens: bool = False, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        return Image(timm.create_model(name, num_classes=0 if tokens else 7, **options), tokens)

    return make


def _vit(name: str, side: int, *, tag: str = "", tokens: bool = False, **facts: Any) -> Entry:
    """An entry for a plain timm transformer of width 48, 3 heads and ``layers`` blocks."""
    options = dict(facts.pop("options", {}))
    layers = int(facts.pop("layers", 4))
    options = {"img_size": side, "embed_dim": 48, "num_heads": 3, "depth": layers, **options}
    if tokens:
        facts = {"pooling": "tokens", "dense": ("tokens",), **facts}
    return Entry(
        name=f"timm:{name}{tag}",
        make=_timm(name, tokens, **options),
        inputs=images(side, "x"),
        layers=layers,
        dynamic=_IMAGE,
        **facts,
    )


def _refused(name: str, side: int, why: str, **options: Any) -> Entry:
    make = _timm(name, **options)
    return Entry(f"timm:{name}", make, images(side, "x"), layers=0, dynamic=_IMAGE, refused=why)


TIMM: tuple[Entry, ...] = (
    _vit("deit_small_patch16_224", 96, **_CLASS),
    _vit("deit_tiny_distilled_patch16_224", 96, prefix=2, class_token=0),
    _vit("deit3_small_patch16_224", 96, **_CLASS),
    _vit("vit_base_patch16_clip_224", 96, **_CLASS),
    _vit("vit_small_patch14_dinov2", 84, **_CLASS),
    _vit("vit_small_patch14_reg4_dinov2", 84, prefix=5, class_token=0),
    _vit(
        "vit_small_patch14_reg4_dinov2",
        84,
        tag=":tokens",
        tokens=True,
        prefix=5,
    ),
    _vit("eva02_tiny_patch14_224", 84, prefix=1, pooling="mean", positional=True),
    _vit(
        "vit_small_patch16_dinov3",
        96,
        prefix=5,
        class_token=0,
        positional=True,
        options={"global_pool": "token"},
    ),
    _vit("beit_base_patch16_224", 96, prefix=1, pooling="mean", positional=True),
    _vit("vit_base_patch16_siglip_224", 96, pooling="attention"),
    _vit("vit_so150m_patch16_reg4_gap_256", 96, prefix=4, pooling="mean"),
    _refused(
        "cait_xxs24_224",
        64,
        "talking heads: logits are mixed between heads",
        img_size=64,
        depth=3,
        embed_dim=48,
    ),
    _refused(
        "swin_tiny_patch4_window7_224",
        56,
        "window attention on a grid",
        img_size=56,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    _refused("convnext_tiny", 64, "no attention", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    _refused("mobilevit_s", 64, "attention inside convolution stages, on unfolded grids"),
)
