"""PatchMerger: a few learned queries each average the tokens that are like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.mix import Mix, Mixer
from thresher.passes.tokens.modules.method import LearnedReduction, ModuleOptions
from thresher.passes.tokens.modules.module import Place, Shapes, anchored
from thresher.passes.tokens.options import TokenOptions
from thresher.passes.tokens.step import Step
from thresher.passes.tokens.view import SiteView


class Queries(Mixer):
    """``Y = softmax(W LN(X)^T) LN(X)``, the softmax over the tokens.

    Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022, section 3.  What is
    averaged is normalised; the norm's scale and shift are learned and begin as those of the stream.
    """

    def shapes(self, place: Place) -> Shapes:
        width = place.width
        return {"scale": (width,), "shift": (width,), "queries": (place.kept, width)}

    def initial(
        self, place: Place, seen: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        behind = seen[0][:, place.protected :].float()
        rows = behind.flatten(0, 1)
        plain = F.layer_norm(rows, rows.shape[-1:])
        # The scale and shift with which normalised tokens come nearest to the tokens.
        mean, deviation = plain.mean(0), plain.std(0).clamp(min=1e-6)
        scale = ((plain - mean) * (rows - rows.mean(0))).mean(0) / deviation.square()
        shift = rows.mean(0) - scale * mean
        queries = anchored((plain * scale + shift).view_as(behind), place.kept)
        return {"scale": scale, "shift": shift, "queries": queries}

    def published(self, place: Place) -> Mapping[str, str]:
        return {
            "scale": "transformer.patch_merger.norm.weight",
            "shift": "transformer.patch_merger.norm.bias",
            "queries": "transformer.patch_merger.queries",
        }

    def adopted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """vit-pytorch divides the logits by the square root of the width, which the paper does not."""
        queries = tensors["queries"]
        return tensors | {"queries": queries * queries.shape[1] ** -0.5}

    def emit(self, site: SiteView) -> tuple[fx.Node, fx.Node]:
        def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], scale.to(x.dtype), shift.to(x.dtype))

        def product(x: Tensor, queries: Tensor) -> Tensor:
            wide = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x, queries.to(x.dtype)).to(wide)

        given = site.weights
        values = site.inline(norm, site.x, given["scale"], given["shift"])
        return site.inline(product, values, given["queries"]), values


class PatchMerger(LearnedReduction[ModuleOptions]):
    """Average the tokens by learned queries, once, in the middle of the network.

    Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022.  Class and register
    tokens, which the paper's models lack, pass by it.  The queries are trained; the model stays frozen.
    """

    name = "patch-merger"
    summary = "average the tokens by learned queries, once, in the middle (PatchMerger)"
    Options = ModuleOptions
    module = Queries()

    def step(self, sites: Sites) -> Step:
        return Mix(self.module)

    def asked(self, sites: Sites) -> TokenOptions:
        given = self.options
        if given.layers is not None or given.counts is not None or isinstance(given.keep, tuple):
            return given
        return given.model_copy(update={"layers": (middle(sites),)})


def middle(sites: Sites) -> int:
    """The site behind the first half of the blocks."""
    return (len(sites.sites) - 1) // 2
