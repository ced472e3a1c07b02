"""The trained part of one adaptive computation module: learners, output bias and gate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.kernels.activations import ACTIVATIONS

NAMES = ("w1", "b1", "v", "c", "w2", "bias", "gate", "gate_bias")


class Learners(nn.Module):
    """``y = bias + sum over n < k of hidden_n(x) w2[n]``, and a gate that chooses k in 0 ... L.

    ``hidden_n(x)`` is ``act(x w1[n] + b1[n])``, in a gated network times ``x v[n] + c[n]``.  The learners
    begin as slices of a dense network's neurons, so that all of them together are that network.  The
    gate is one affine map, which is what the published stack of linears without a non-linearity
    amounts to.
    """

    w1: Tensor
    b1: Tensor
    v: Tensor
    c: Tensor
    w2: Tensor
    bias: Tensor
    gate: Tensor
    gate_bias: Tensor

    def __init__(self, weights: Mapping[str, Tensor], activation: str) -> None:
        """Copies ``w1 [L, D, H], b1 [L, H], w2 [L, H, D], bias [D]``, of a gated network also ``v`` and
        ``c`` as w1 and b1, and a ``gate [L + 1, D]`` with its ``gate_bias`` if there is one.
        """
        super().__init__()
        learners, width, _ = weights["w1"].shape
        like = weights["w1"]
        self.activation = activation
        gate = {
            "gate": like.new_zeros(learners + 1, width),
            "gate_bias": like.new_zeros(learners + 1),
        }
        given = {**gate, **weights}
        for name in (name for name in NAMES if name in given):
            self.register_parameter(name, nn.Parameter(given[name].detach().clone()))

    @classmethod
    def dense(
        cls,
        bent: tuple[Tensor, Tensor | None],
        factor: tuple[Tensor, Tensor | None] | None,
        down: tuple[Tensor, Tensor | None],
        activation: str,
    ) -> Learners:
        """One learner that is a whole network, of ``[H, D]`` and ``[D, H]`` weights and biases of linears."""
        w1, b1 = _by_input(*bent)
        w2, bias = _by_input(*down)
        weights = {"w1": w1, "b1": b1, "w2": w2, "bias": bias[0]}
        if factor is not None:
            weights["v"], weights["c"] = _by_input(*factor)
        return cls(weights, activation)

    def cut(self, order: Tensor, learners: int) -> Learners:
        """One learner's neurons in another order ``[H]``, dealt out to so many learners block by block."""
        width, hidden = self.w1.shape[1:]
        blocks = (learners, hidden // learners)

        def dealt(name: str, whole: Tensor) -> Tensor:
            if name == "w2":
                return whole[0, order].reshape(*blocks, width)
            if whole.dim() == 2:
                return whole[0, order].reshape(blocks)
            return whole[0, :, order].reshape(width, *blocks).transpose(0, 1).contiguous()

        weights = {n: w.detach() for n, w in self.named_parameters() if not n.startswith("gate")}
        bias = weights.pop("bias")
        return Learners(
            {n: dealt(n, w) for n, w in weights.items()} | {"bias": bias}, self.activation
        )

    @property
    def gated(self) -> bool:
        """Whether the network has a second factor."""
        return hasattr(self, "v")

    @property
    def count(self) -> int:
        """Learners L."""
        return self.w1.shape[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one learner for one token."""
        return (3 if self.gated else 2) * self.w1[0].numel()

    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters but those of the gate, by name, in the operator's order."""
        return {n: p for n, p in self.named_parameters() if not n.startswith("gate")}

    def gates(self) -> dict[str, nn.Parameter]:
        """The parameters of the gate, by name."""
        return {n: p for n, p in self.named_parameters() if n.startswith("gate")}

    def logits(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., L + 1]``: of the choice of each number of learners."""
        return F.linear(x, self.gate, self.gate_bias)

    def prefixes(self, x: Tensor) -> Tensor:
        """``[T, D] -> [L + 1, T, D]``: the result with 0, 1, ... L learners."""
        each = self.hidden(x).transpose(0, 1) @ self.w2
        none = torch.zeros_like(each[:1])
        return self.bias + torch.cat([none, each]).cumsum(0)

    def hidden(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., L, H]``: all neurons in one product, as in the dense network."""
        values: Tensor = ACTIVATIONS[self.activation](self._up(x, self.w1, self.b1))
        return values * self._up(x, self.v, self.c) if self.gated else values

    def _up(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        learners, width, hidden = weight.shape
        wide = weight.transpose(0, 1).reshape(width, learners * hidden)
        return (x @ wide + bias.flatten()).reshape(*x.shape[:-1], learners, hidden)

    def mixed(self, x: Tensor, run: Tensor) -> Tensor:
        """The result where learner n counts ``run[..., n]`` times: ``[..., D], [..., L] -> [..., D]``."""
        weighed = self.hidden(x) * run[..., None]
        return weighed.flatten(-2) @ self.w2.flatten(0, 1) + self.bias


def _by_input(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``[O, I], [O]`` of a linear as one learner's ``[1, I, O], [1, O]``."""
    return weight.T[None], (weight.new_zeros(len(weight)) if bias is None else bias)[None]


def running(choice: Tensor) -> Tensor:
    """``[..., L + 1] -> [..., L]``: from (soft or hard) choices to how far each learner runs.

    ``run_n = sum over m > n of choice_m``, so that a gradient of the output reaches every choice.
    """
    return choice.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def learners_run(choice: Tensor) -> Tensor:
    """``[..., L + 1] -> [...]``: the number of learners, with the choice's gradient."""
    return choice @ torch.arange(choice.shape[-1], dtype=choice.dtype, device=choice.device)


def straight_through(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One-hot ``[..., M]`` of the noisy logits' largest, with the gradient of their softmax.

    Hard Gumbel-softmax: ``softmax((log g + noise) / T)``; zero noise makes it the argmax.
    """
    soft = ((logits.log_softmax(-1) + noise) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())


def gumbel(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Noise of the Gumbel distribution."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return -(-(uniform.clamp(min=1e-12)).log()).log().to(dtype)
