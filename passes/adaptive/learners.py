"""The trained part of one adaptive computation module: learners, output bias and gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.kernels.activations import ACTIVATIONS

NAMES = ("w1", "b1", "w2", "bias")  # everything but the gate


class Learners(nn.Module):
    """``y = bias + sum over n < k of act(x w1[n] + b1[n]) w2[n]``, and a gate that chooses k in 0 ... L.

    The learners begin as slices of a dense network's neurons, so that all of them together are that
    network.  The gate is one affine map, which is what the published stack of linears without a
    non-linearity amounts to.
    """

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, bias: Tensor, activation: str) -> None:
        """``w1 [L, D, H], b1 [L, H], w2 [L, H, D], bias [D]``, which are copied."""
        super().__init__()
        learners, width, _ = w1.shape
        self.activation = activation
        self.w1, self.b1 = nn.Parameter(w1.clone()), nn.Parameter(b1.clone())
        self.w2, self.bias = nn.Parameter(w2.clone()), nn.Parameter(bias.clone())
        self.gate = nn.Parameter(torch.zeros(learners + 1, width, dtype=w1.dtype))
        self.gate_bias = nn.Parameter(torch.zeros(learners + 1, dtype=w1.dtype))

    @classmethod
    def dense(
        cls, up: Tensor, up_bias: Tensor | None, down: Tensor, bias: Tensor | None, activation: str
    ) -> Learners:
        """One learner that is a whole network; ``up [H, D]`` and ``down [D, H]`` as linears store them."""
        inner = torch.zeros_like(up[:, 0]) if up_bias is None else up_bias
        outer = torch.zeros_like(down[:, 0]) if bias is None else bias
        return cls(up.T[None], inner[None], down.T[None], outer, activation)

    def cut(self, order: Tensor, learners: int) -> Learners:
        """One learner's neurons in another order ``[H]``, dealt out to so many learners block by block."""
        with torch.no_grad():
            width, hidden = self.w1.shape[1:]
            blocks = (learners, hidden // learners)
            w1 = self.w1[0, :, order].reshape(width, *blocks).transpose(0, 1).contiguous()
            b1 = self.b1[0, order].reshape(blocks)
            w2 = self.w2[0, order].reshape(*blocks, width)
            return Learners(w1, b1, w2, self.bias, self.activation)

    @property
    def count(self) -> int:
        """Learners L."""
        return self.w1.shape[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one learner for one token."""
        return 2 * self.w1[0].numel()

    def trained(self) -> list[nn.Parameter]:
        """All parameters but those of the gate."""
        return [getattr(self, name) for name in NAMES]

    def gates(self) -> list[nn.Parameter]:
        return [self.gate, self.gate_bias]

    def logits(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., L + 1]``: of the choice of each number of learners."""
        return F.linear(x, self.gate, self.gate_bias)

    def prefixes(self, x: Tensor) -> Tensor:
        """``[T, D] -> [L + 1, T, D]``: the result with 0, 1, ... L learners."""
        act = ACTIVATIONS[self.activation]
        each = act(x @ self.w1 + self.b1[:, None]) @ self.w2
        none = torch.zeros_like(each[:1])
        return self.bias + torch.cat([none, each]).cumsum(0)

    def hidden(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., L, H]``: all neurons in one product, as in the dense network."""
        learners, width, hidden = self.w1.shape
        wide = self.w1.transpose(0, 1).reshape(width, learners * hidden)
        values: Tensor = ACTIVATIONS[self.activation](x @ wide + self.b1.flatten())
        return values.reshape(*x.shape[:-1], learners, hidden)

    def mixed(self, x: Tensor, run: Tensor) -> Tensor:
        """The result where learner n counts ``run[..., n]`` times: ``[..., D], [..., L] -> [..., D]``."""
        weighed = self.hidden(x) * run[..., None]
        return weighed.flatten(-2) @ self.w2.flatten(0, 1) + self.bias


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
