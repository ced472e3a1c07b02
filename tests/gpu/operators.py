"""Section ``operators``: each Triton kernel by itself against its reference, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import thresher.kernels.ops  # noqa: F401
from tests.gpu.rows import Row, Setting, compared, timed
from tests.kernels import triton_back_end
from thresher.kernels.adaptive_gated_mlp.reference import adaptive_gated_mlp
from thresher.kernels.adaptive_mlp.reference import adaptive_mlp
from thresher.kernels.bipartite_merge.reference import bipartite_merge
from thresher.kernels.class_attention.reference import class_attention
from thresher.kernels.gather_tokens.reference import gather_tokens
from thresher.kernels.gpu.dispatch import kernels
from thresher.kernels.keep_tokens.reference import keep_tokens
from thresher.kernels.prune_merge.reference import prune_merge

SECTION = "operators"
SIZES = ((8, 197), (1, 197), (64, 197), (8, 577), (1, 4096), (8, 4096))
COMPILED = ((8, 197), (1, 4096))  # merging only: compiling a reference takes long
WIDTH, HEADS, DEPTH = 384, 6, 64


def operators(setting: Setting) -> Iterator[Row]:
    """Rows by operator and size: reference over kernel, first eager, then compiled."""
    triton_back_end.device()
    for size in ((2, 9),) if setting.dry else SIZES:
        for reference, arguments in cases(setting, *size):
            yield measured(setting, "eager", size, reference, reference, arguments)
    for size in () if setting.dry else COMPILED:
        for reference, arguments in list(cases(setting, *size))[:2]:
            compiled = torch.compile(reference, dynamic=False)
            yield measured(setting, "compiled", size, reference, compiled, arguments)


def measured(
    setting: Setting, kind: str, size: tuple[int, int], reference: Any, run: Any, arguments: Any
) -> Row:
    """The row of a reference, as it is run, against the kernel."""
    kernel = kernels(reference.__name__)
    assert kernel is not None
    theirs, ours = timed(setting, [partial(run, *arguments), partial(kernel, *arguments)])
    case = f"{reference.__name__}, {size[1]} tokens: reference {kind}"
    return compared(SECTION, case, theirs, ours, batch=size[0])


def cases(setting: Setting, batch: int, tokens: int) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """References with arguments; a fifteenth of the tokens merges, a fifth is dropped."""
    torch.manual_seed(0)
    make = partial(torch.randn, device=setting.device, dtype=setting.dtype)
    x, metric = make(batch, tokens, WIDTH), make(batch, HEADS, tokens, DEPTH)
    size = torch.ones(batch, tokens, device=setting.device)
    score = torch.rand(batch, tokens, device=setting.device)
    fewer, some = tokens - tokens // 5, tokens - max(tokens // 15, 1)
    index = torch.randint(0, tokens, (batch, fewer), device=setting.device)
    yield bipartite_merge, (x, size, metric, some, 1, True)
    yield prune_merge, (x, size, score, some, fewer, 1)
    yield keep_tokens, (x, score, fewer, 1, True)
    yield class_attention, (metric, metric, None, 0.125, 0)
    yield gather_tokens, (x, index)
    learners = make(4, WIDTH, WIDTH) / WIDTH**0.5  # half of which run
    k = torch.randint(0, 5, (batch, tokens), device=setting.device)
    yield adaptive_mlp, (x, k, learners, make(4, WIDTH), learners, "gelu")
    both = (learners, make(4, WIDTH), learners.flip(0), make(4, WIDTH), learners)
    yield adaptive_gated_mlp, (x, k, *both, "silu")
