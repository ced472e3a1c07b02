"""SiT's token slimming: a small network weighs the tokens for each one that stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.mix import Mix, Mixer
from thresher.passes.tokens.modules.method import LearnedReduction, ModuleOptions
from thresher.passes.tokens.modules.module import Place, Shapes, anchored, normal
from thresher.passes.tokens.step import Step
from thresher.passes.tokens.view import SiteView


class Slimming(Mixer):
    """``softmax(s W2 GELU(W1 LN(X)))^T X``, the softmax over the tokens; W1 halves the channels.

    Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, section 3.2.
    """

    def shapes(self, place: Place) -> Shapes:
        width, hidden, kept = place.width, place.width // 2, place.kept
        return {
            "norm_scale": (width,), "norm_shift": (width,),
            "first": (hidden, width), "first_bias": (hidden,),
            "second": (kept, hidden), "second_bias": (kept,),
            "sharpness": (),
        }  # fmt: skip

    def initial(
        self, place: Place, seen: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        behind, hidden = seen[0][:, place.protected :].float(), place.width // 2
        first = normal(generator, hidden, place.width)
        features = F.gelu(F.layer_norm(behind, behind.shape[-1:]) @ first.T)
        return {
            "norm_scale": torch.ones(place.width), "norm_shift": torch.zeros(place.width),
            "first": first, "first_bias": torch.zeros(hidden),
            "second": anchored(features, place.kept), "second_bias": torch.zeros(place.kept),
            "sharpness": torch.ones(()),
        }  # fmt: skip

    def published(self, place: Place) -> Mapping[str, str]:
        keys = {
            "norm_scale": "weight.0.weight", "norm_shift": "weight.0.bias",
            "first": "weight.1.weight", "first_bias": "weight.1.bias",
            "second": "weight.3.weight", "second_bias": "weight.3.bias",
            "sharpness": "scale",
        }  # fmt: skip
        return {name: f"tsm.{place.number}.{key}" for name, key in keys.items()}

    def adopted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"sharpness": tensors["sharpness"].reshape(())}

    def emit(self, site: SiteView) -> tuple[fx.Node, fx.Node]:
        def logits(x: Tensor, *weights: Tensor) -> Tensor:
            scale, shift, first, first_bias, second, second_bias, sharpness = (
                weight.to(x.dtype) for weight in weights
            )
            normed = F.layer_norm(x, x.shape[-1:], scale, shift)
            hidden = F.gelu(F.linear(normed, first, first_bias))
            wide = torch.promote_types(x.dtype, torch.float32)
            return F.linear(hidden, second, second_bias).to(wide) * sharpness.to(wide)

        return site.inline(logits, site.x, *site.weights.values()), site.x


class Sit(LearnedReduction[ModuleOptions]):
    """Average the tokens by small networks, at three places.

    Zong et al., "Self-slimmed Vision Transformer", ECCV 2022.  Class and register tokens pass by
    them.  The networks are trained against the dense model, which stays frozen; the published
    training also trains the model and restores the tokens of every layer with reverse modules.
    """

    name = "sit"
    summary = "average the tokens by small trained networks, at three places (SiT)"
    Options = ModuleOptions
    module = Slimming()

    def step(self, sites: Sites) -> Step:
        return Mix(self.module)
