"""Section ``networks``: layers that skip weights, and learners, against the dense layers they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch.nn import functional as F

import thresher.kernels.ops  # noqa: F401
from tests.gpu.models import graph
from tests.gpu.rows import Call, Row, Setting, compared, timed
from tests.kernels import triton_back_end
from thresher.kernels.gpu.dispatch import kernels

SECTION = "networks"
LINEARS = ((4096, 11008), (768, 3072))
SKIPPED = (0.5, 0.7, 0.9)
LEARNERS, WIDTH = 4, 768
BATCHES = (8, 64)  # of images of 197 tokens
RUN = (0.25, 0.5, 0.75)  # mean shares of the learners
BEYOND_CACHES = 2**28  # bytes: weights are streamed from memory, as between two steps of a decoder
NOTES = {"cuda": "CUDA graph", "cpu": "dry"}


def networks(setting: Setting) -> Iterator[Row]:
    """Rows by layer and by what is skipped; the ideal is the share of the weights or of the learners."""
    triton_back_end.device()
    for width, columns in ((32, 48),) if setting.dry else LINEARS:
        for skipped in SKIPPED:
            yield linear(setting, width, columns, skipped)
            yield gated(setting, width, columns, skipped)
    for batch in setting.batches[:1] if setting.dry else BATCHES:
        for share in RUN:
            yield learners(setting, batch, share)


def linear(setting: Setting, width: int, columns: int, skipped: float) -> Row:
    """One token times a matrix, of which only the rows of large inputs are read."""
    x, threshold = torch.randn(1, width, **where(setting)), limits(setting, width, skipped)
    weights = [matrix(setting, width, columns) for _ in range(copies(setting, width * columns))]
    skipping = kernel("sparse_linear")
    return row(
        setting, f"sparse_linear {width}x{columns}, {skipped:.0%} skipped", 1, 1 / (1 - skipped),
        [partial(torch.mm, x, weight) for weight in weights],
        [partial(skipping, x, weight, threshold, 8) for weight in weights],
    )  # fmt: skip


def gated(setting: Setting, width: int, columns: int, skipped: float) -> Row:
    """One token through a SwiGLU network whose neurons are chosen by their gate."""
    x = torch.randn(1, width, **where(setting))
    sets = [
        (matrix(setting, width, columns), matrix(setting, columns, width), matrix(setting, columns, width))
        for _ in range(copies(setting, 3 * width * columns))
    ]  # fmt: skip
    h = F.silu(x @ sets[0][0]).abs().float().flatten()
    threshold = h.quantile(skipped).expand(columns).contiguous()
    skipping = kernel("sparse_gated_ffn")

    def dense(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (F.silu(x @ gate) * F.linear(x, up)) @ down

    return row(
        setting, f"sparse_gated_ffn {width}x{columns}, {skipped:.0%} of the neurons skipped", 1,
        3 / (3 - 2 * skipped),
        [partial(dense, *one) for one in sets],
        [partial(skipping, x, *one, threshold, "silu", 8) for one in sets],
    )  # fmt: skip


def learners(setting: Setting, batch: int, share: float) -> Row:
    """A GELU network of a ViT-B's size as four learners, of which each token runs some."""
    width = 32 if setting.dry else WIDTH
    x = torch.randn(batch, 197, width, **where(setting))
    w1, w2 = matrix(setting, width, LEARNERS * width), matrix(setting, LEARNERS * width, width)
    b1, b2 = (torch.randn(size, **where(setting)) for size in (LEARNERS * width, width))
    k = torch.full((batch, 197), LEARNERS * share, device=setting.device)
    k = (k + 2 * torch.rand_like(k) - 1).round().clamp(0, LEARNERS).long()
    parts: tuple[torch.Tensor, ...] = (
        w1.view(width, LEARNERS, width).transpose(0, 1),
        b1.view(LEARNERS, width),
        w2.view(LEARNERS, width, width),
        b2,
    )
    parts = tuple(part.contiguous() for part in parts)
    up, down = w1.T.contiguous(), w2.T.contiguous()
    adaptive = kernel("adaptive_mlp")
    return row(
        setting, f"adaptive_mlp {LEARNERS}x{width}, {share:.0%} of the learners", batch,
        LEARNERS / float(k.float().mean()),
        [lambda: F.linear(F.gelu(F.linear(x, up, b1)), down, b2)],
        [partial(adaptive, x, k, *parts, "gelu")],
    )  # fmt: skip


def row(
    setting: Setting, case: str, batch: int, ideal: float, dense: list[Any], ours: list[Any]
) -> Row:
    """Both as one CUDA graph each, where launching costs nothing; times are of one layer."""
    sides: list[Call] = [partial(every, calls) for calls in (dense, ours)]
    if setting.device == "cuda":
        sides = [graph(side) for side in sides]
    with torch.inference_mode():
        before, after = ([t / len(dense) for t in times] for times in timed(setting, sides))
    note = f"{NOTES[setting.device]}; baseline: dense"
    return compared(SECTION, case, before, after, batch=batch, ideal=ideal, note=note)


def every(calls: list[Any]) -> list[Any]:
    return [call() for call in calls]


def kernel(name: str) -> Any:
    found = kernels(name)
    assert found is not None
    return found


def where(setting: Setting) -> dict[str, Any]:
    return {"device": setting.device, "dtype": setting.dtype}


def matrix(setting: Setting, rows: int, columns: int) -> torch.Tensor:
    made: torch.Tensor = torch.randn(rows, columns, **where(setting)) / rows**0.5
    return made


def limits(setting: Setting, width: int, skipped: float) -> torch.Tensor:
    """The threshold below which that share of normally distributed inputs lies."""
    at = NormalDist().inv_cdf((1 + skipped) / 2)
    return torch.full((width,), at, device=setting.device)


def copies(setting: Setting, elements: int) -> int:
    """Of weights, so that together no cache holds them."""
    return 1 if setting.dry else max(1, -(-BEYOND_CACHES // (elements * 2)))
