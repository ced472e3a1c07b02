"""Section ``operators``: each Triton kernel by itself against its reference, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import thresher.kernels.ops  # noqa: F401
from tests.gpu.models import graph
from tests.gpu.rows import Call, Row, Setting, compared, timed
from tests.kernels import cuda_back_end, triton_back_end
from thresher.kernels.adaptive_gated_mlp.reference import adaptive_gated_mlp
from thresher.kernels.adaptive_mlp.reference import adaptive_mlp
from thresher.kernels.bipartite_merge.reference import bipartite_merge
from thresher.kernels.class_attention.reference import class_attention
from thresher.kernels.expert_mlp.reference import expert_mlp
from thresher.kernels.gather_tokens.reference import gather_tokens
from thresher.kernels.gpu.dispatch import kernels
from thresher.kernels.keep_tokens.reference import keep_tokens
from thresher.kernels.operator import Operator
from thresher.kernels.prune_merge.reference import prune_merge
from thresher.kernels.redundant_merge.reference import redundant_merge
from thresher.kernels.registry import BY_TORCH_NAME, OPERATORS
from thresher.kernels.select_diverse.reference import select_diverse
from thresher.kernels.split_merge.reference import split_merge
from thresher.kernels.token_energy.reference import token_energy

SECTION = "operators"
SIZES = ((8, 197), (1, 197), (64, 197), (8, 577), (1, 4096), (8, 4096))
COMPILED = ((8, 197), (1, 4096))  # merging only: compiling a reference takes long
WIDTH, HEADS, DEPTH = 384, 6, 64


def operators(setting: Setting) -> Iterator[Row]:
    """Rows by operator and size: the reference, eager or compiled, and the CUDA kernel over the Triton kernel."""
    triton_back_end.device()
    for size in ((2, 9),) if setting.dry else SIZES:
        for reference, arguments in cases(setting, *size):
            yield measured(setting, "reference", size, reference.__name__, reference, arguments)
    for size in () if setting.dry else SIZES[:1] + SIZES[-1:]:
        for reference, arguments in cases(setting, *size):
            name = reference.__name__
            operator = OPERATORS["FuseTokens"] if name == "keep_tokens" else BY_TORCH_NAME[name]
            if operator.cuda:
                call = in_cuda(operator, arguments)
                yield measured(setting, "CUDA kernel", size, name, lambda *_: call(), arguments)  # noqa: B023
    for size in () if setting.dry else COMPILED:
        for reference, arguments in list(cases(setting, *size))[:2]:
            compiled = torch.compile(reference, dynamic=False)
            yield measured(
                setting, "compiled reference", size, reference.__name__, compiled, arguments
            )


def measured(
    setting: Setting, kind: str, size: tuple[int, int], name: str, run: Any, arguments: Any
) -> Row:
    """The row of an implementation against the Triton kernel; on a device both as CUDA graphs."""
    kernel = kernels(name)
    assert kernel is not None
    calls: list[Call] = [partial(one, *arguments) for one in (run, kernel)]
    if setting.device == "cuda":
        calls = [graph(call) for call in calls]
    theirs, ours = timed(setting, calls)
    return compared(SECTION, f"{name}, {size[1]} tokens: {kind}", theirs, ours, batch=size[0])


def in_cuda(operator: Operator, arguments: tuple[Any, ...]) -> Callable[[], None]:
    """The CUDA kernel's call for the arguments of the operator in torch."""
    names = [*operator.inputs, *operator.attributes]
    given = dict(zip(names, arguments, strict=False))
    tensors = {
        name: value.contiguous() if isinstance(value, torch.Tensor) else torch.tensor(value or 0)
        for name, value in given.items()
        if name in operator.inputs
    }
    counts = {name: given[name] for name in operator.counts}
    shapes = operator.output_shapes({n: t.shape for n, t in tensors.items()}, counts)
    kinds = {"T": arguments[0].dtype, "tensor(float)": torch.float32, "tensor(int64)": torch.int64}
    outputs = [
        torch.empty(s, dtype=kinds[operator.outputs[n]], device="cuda") for n, s in shapes.items()
    ]
    inputs = [
        tensor.to("cuda", kinds[operator.inputs[name]])
        for name, tensor in tensors.items()
        if name not in counts
    ]
    numbers = counts | {name: given[name] for name in operator.attributes}
    return cuda_back_end.prepared(operator.name, inputs, outputs, numbers)[0]


def cases(setting: Setting, batch: int, tokens: int) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """References with arguments; a fifteenth of the tokens merges, a fifth is dropped."""
    torch.manual_seed(0)
    make = partial(torch.randn, device=setting.device, dtype=setting.dtype)
    width = DEPTH if setting.dry else WIDTH
    x, metric = make(batch, tokens, width), make(batch, HEADS, tokens, DEPTH)
    size = torch.ones(batch, tokens, device=setting.device)
    score = torch.rand(batch, tokens, device=setting.device)
    fewer, some = tokens - tokens // 5, tokens - max(tokens // 15, 1)
    index = torch.randint(0, tokens, (batch, fewer), device=setting.device)
    yield bipartite_merge, (x, size, metric, some, 1, True)
    yield prune_merge, (x, size, score, some, fewer, 1)
    yield keep_tokens, (x, score, fewer, 1, True)
    yield select_diverse, (x, size, fewer, 1)
    yield token_energy, (metric, size, 0.9, 1)
    yield class_attention, (metric, metric, None, 0.125, 0)
    yield gather_tokens, (x, index)
    yield redundant_merge, (x, size, metric, score, some, 1)
    yield split_merge, (x, size, metric, score, some, 1)
    learners = make(4, width, width) / width**0.5  # half of which run
    k = torch.randint(0, 5, (batch, tokens), device=setting.device)
    yield adaptive_mlp, (x, k, learners, make(4, width), learners, make(width), "gelu")
    both = (learners, make(4, width), learners.flip(0), make(4, width), learners, make(width))
    yield adaptive_gated_mlp, (x, k, *both, "silu")
    run = torch.rand(batch, tokens, 4, device=setting.device) < 0.5
    yield expert_mlp, (x, run, learners, make(4, width), learners, make(width), "gelu")
