"""DynamicViT: a small network predicts which tokens are worth keeping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from thresher.compiler.analysis.sites import Sites
from thresher.passes.adaptive.learners import gumbel, straight_through
from thresher.passes.learning.loss import Outputs
from thresher.passes.tokens.learning.masked import MaskedForward
from thresher.passes.tokens.modules.job import Job
from thresher.passes.tokens.modules.method import LearnedReduction, ModuleOptions
from thresher.passes.tokens.modules.module import Module, Place, Shapes, normal
from thresher.passes.tokens.modules.student import Inputs, Student
from thresher.passes.tokens.reduce import Weights
from thresher.passes.tokens.score import Scorer
from thresher.passes.tokens.step import Keep, Step
from thresher.passes.tokens.view import SiteView

RATIO = 2.0  # weight of the kept shares' error, as published
TEMPERATURE = 1.0


class Prediction(Module, Scorer):
    """The logarithm of the chance that a token is worth keeping.

    ``h = GELU(W LN(x))``; half of the channels stay, of the others the mean over all tokens is taken, and
    an MLP (C, C/2, C/4, 2) on both gives the chances of staying and of going.  Rao et al.,
    "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021,
    section 3.2.  About an eighth of a block's multiplications.
    """

    name = "prediction"

    def shapes(self, place: Place) -> Shapes:
        width = place.width
        local = width // 2
        return {
            "norm_scale": (width,), "norm_shift": (width,),
            "first": (width, width), "first_bias": (width,),
            "second": (local, width), "second_bias": (local,),
            "third": (width // 4, local), "third_bias": (width // 4,),
            "last": (2, width // 4), "last_bias": (2,),
        }  # fmt: skip

    def initial(
        self, place: Place, seen: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The chance begins near the share that is to stay, for every token."""
        share = min(place.kept / place.came, 0.99)
        made: dict[str, Tensor] = {}
        for name, shape in self.shapes(place).items():
            made[name] = normal(generator, *shape) if len(shape) == 2 else torch.zeros(shape)
        odds = torch.tensor([share, 1 - share]).log()
        return made | {"norm_scale": torch.ones(place.width), "last_bias": odds}

    def published(self, place: Place) -> Mapping[str, str]:
        layers = {
            "norm": "in_conv.0", "first": "in_conv.1", "second": "out_conv.0", "third": "out_conv.2",
            "last": "out_conv.4",
        }  # fmt: skip
        keys = {"norm_scale": "in_conv.0.weight", "norm_shift": "in_conv.0.bias"}
        for name in ("first", "second", "third", "last"):
            keys |= {name: f"{layers[name]}.weight", f"{name}_bias": f"{layers[name]}.bias"}
        return {name: f"score_predictor.{place.number}.{key}" for name, key in keys.items()}

    def emit(self, site: SiteView) -> fx.Node:
        prefix = site.protected

        def score(x: Tensor, *given: Tensor) -> Tensor:
            alive, weights = (None, given) if site.size is None else (given[0] > 0, given[1:])
            seen = None if alive is None else alive[:, prefix:].to(x.dtype)
            chance = chances(x[:, prefix:], seen, *weights)[..., 0].float()
            return torch.cat([torch.zeros_like(x[:, :prefix, 0]).float(), chance], dim=1)

        given = [] if site.size is None else [site.size]
        return site.inline(score, site.x, *given, *site.weights.values())


def chances(x: Tensor, alive: Tensor | None, *weights: Tensor) -> Tensor:
    """``[B, n, 2]`` log-chances of staying and of going.

    Args:
        x: ``[B, n, C]`` tokens behind the prefix.
        alive: ``[B, n]`` what each of them counts in the mean; None: all count the same.
        weights: in the order of :meth:`Prediction.shapes`.
    """
    scale, shift, *layers = (weight.to(x.dtype) for weight in weights)
    first, first_bias, second, second_bias, third, third_bias, last, last_bias = layers
    hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], scale, shift), first, first_bias))
    half = hidden.shape[-1] // 2
    local, everywhere = hidden[..., :half], hidden[..., half:]
    if alive is None:
        mean = everywhere.mean(1, keepdim=True)
    else:
        total = alive.sum(1).clamp(min=1.0)[:, None, None]
        mean = (everywhere * alive[..., None]).sum(1, keepdim=True) / total
    both = torch.cat([local, mean.expand(-1, x.shape[1], -1)], dim=-1)
    both = F.gelu(F.linear(both, second, second_bias))
    both = F.gelu(F.linear(both, third, third_bias))
    return F.linear(both, last, last_bias).log_softmax(-1)


class Deciding(MaskedForward):
    """The training of the publication: every token stays in its place, and those that go are masked.

    A token stays by a draw (straight-through Gumbel softmax), once gone it is gone.  The penalty is
    the error of the kept shares, ``2 mean_sites (mean kept - wanted)^2``.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job.program, job.plan.sites)
        self.places = {place.layer: place for place in job.places}
        self._weights: Weights = {}
        self._generator = torch.Generator()
        self._errors: list[Tensor] = []

    def trained(
        self, inputs: Inputs, weights: Weights, generator: torch.Generator
    ) -> tuple[Outputs, Tensor]:
        self._weights, self._generator, self._errors = weights, generator, []
        found = self.outputs(inputs, self.places)
        return found, RATIO * torch.stack(self._errors).mean()

    def reduce(self, x: Tensor, policy: Place) -> Tensor:
        prefix = policy.protected
        if self._alive is None:
            self._alive = torch.ones(x.shape[:2])
        before = self._alive[:, prefix:]
        real = (
            torch.ones_like(before) if self._size is None else (self._size[:, prefix:] > 0).float()
        )
        logits = chances(x[:, prefix:], before, *self._weights[policy.layer].values()).float()
        noise = gumbel(logits.shape, self._generator, logits.dtype)
        stays = straight_through(logits, noise, TEMPERATURE)[..., 0] * before
        best = torch.where(before > 0, logits[..., 0].detach(), -torch.inf).argmax(1)
        last = F.one_hot(best, before.shape[1]).to(stays.dtype)
        stays = torch.where(stays.sum(1, keepdim=True) > 0, stays, last)  # never none at all
        share = (stays * real).sum(1) / real.sum(1).clamp(min=1.0)
        self._errors.append((share - policy.kept / policy.patches).square().mean())
        self._alive = torch.cat([self._alive[:, :prefix], stays], dim=1)
        return x


class DynamicVit(LearnedReduction[ModuleOptions]):
    """Keep the tokens that a small trained network predicts to be worth it, at three places.

    Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS
    2021.  The networks are trained with the publication's masked attention and kept shares, against
    the labels and the dense model's answers; the model, which is trained as well there, stays frozen.
    The graph keeps a fixed number.
    """

    name = "dynamic-vit"
    summary = "keep the tokens that small trained networks predict to be worth it (DynamicViT)"
    Options = ModuleOptions
    module = Prediction()

    def step(self, sites: Sites) -> Step:
        return Keep(self.module, between=True)

    def student(self, job: Job) -> Student:
        return Deciding(job)
