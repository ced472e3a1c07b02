"""Compiles every Triton kernel for GPUs that are not there, as the operators would launch it.

    python -m tests.kernels.triton_compile 80 90

Prints kernel, type, GPU, bytes of machine code and of shared memory, and bytes of the widest access to
memory.  The launches are recorded instead of made, so nothing that is launched can be forgotten.  It runs
in a process of its own: the tests interpret kernels, and Triton decides that when it is imported.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from thresher.kernels.gpu.dispatch import kernels

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
         torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}  # fmt: skip
VECTOR = re.compile(r"global[.\w:]*\.v(\d)\.b(\d+)")
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+)")
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, options


def calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every operator with every switch that changes its kernels."""
    x, size, metric = torch.empty(2, 197, 384), torch.empty(2, 197), torch.empty(2, 6, 197, 64)
    x, metric, index = x.to(dtype), metric.to(dtype), torch.empty(2, 150, dtype=torch.int64)
    for by_index in (True, False):
        yield "bipartite_merge", (x, size, metric, 184, 1, by_index)
    many = [
        t.repeat_interleave(6, -2 if t.dim() > 2 else -1) for t in (x, size, metric)
    ]  # larger blocks
    yield "bipartite_merge", (*many, 1000, 1, True)
    for bias in (None, torch.empty(2, 1, 1, 197), torch.empty(197, 197, dtype=torch.bool)):
        yield "class_attention", (metric, metric, bias, 0.125, 0)
    for fuse in (True, False):
        yield "keep_tokens", (x, size, 150, 1, fuse)
    learners = torch.empty(4, 384, 384).to(dtype)
    both, back = (learners, learners[:, 0]), (learners, learners[0, 0])
    for act in ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu"):
        yield "adaptive_mlp", (x, x[..., 0].long(), *both, *back, act)
    rows = x.repeat_interleave(24, 0)  # more tokens: larger blocks
    yield "adaptive_mlp", (rows, rows[..., 0].long(), *both, *back, "gelu")
    yield "adaptive_gated_mlp", (rows, rows[..., 0].long(), *both, *both, *back, "silu")
    yield "adaptive_gated_mlp", (x, x[..., 0].long(), *both, *both, *back, "silu")
    for some in (x, rows):
        yield "expert_mlp", (some, some[..., :4] > 0, *both, *back, "gelu")
    yield "prune_merge", (x, size, size, 180, 150, 1)
    for some, sizes in ((x, size), many[:2]):
        yield "select_diverse", (some, sizes, 150, 1)
    for keys, sizes in ((metric, size), (many[2], many[1])):
        yield "token_energy", (keys, sizes, 0.9, 1)
    for name in ("redundant_merge", "split_merge"):
        yield name, (x, size, metric, size, 184, 1)
        yield name, (*many, many[1], 1000, 1)
    yield "gather_tokens", (x, index)
    yield "restore_tokens", (x[:, :120], index, x[:, :150])
    gate, up, down = (
        torch.empty(size, dtype=dtype) for size in ((384, 1024), (1024, 384), (1024, 384))
    )
    threshold = torch.empty(1024)
    for token in (x[0, :1], x[0, :7]):
        yield "sparse_linear", (token, gate, threshold[:384], 8)
        yield "sparse_gated_ffn", (token, gate, up, down, threshold, "silu", 8)
    yield "sparse_linear", (x[0, :1].float(), gate.bfloat16(), threshold[:384], 8)


def launches(dtype: torch.dtype, operators: Sequence[str] = ()) -> list[Launch]:
    """The different kernels that some or all operators would launch, with their arguments in order."""
    made: dict[str, Launch] = {}

    def record(kernel: Any, *arguments: Any, **more: Any) -> None:
        options = {name: more[name] for name in ("num_warps",) if name in more}
        key = f"{kernel.__name__} {_constants(kernel, arguments)} {options}"
        made.setdefault(key, (kernel, arguments, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        for name, arguments in calls(dtype):
            operator = kernels(name)
            assert operator is not None
            if not operators or name in operators:
                operator(*arguments)
    finally:
        JITFunction.run = run
    return list(made.values())


def code(launch: Launch, capability: int) -> Any:
    """What Triton compiles for a compute capability such as 90, specialised as at a launch."""
    kernel, arguments, options = launch
    constants = _constants(kernel, arguments)
    signature, attributes = {}, {}
    for parameter, value in zip(kernel.params, arguments, strict=True):
        special = not parameter.do_not_specialize
        if special and isinstance(value, int) and value == 1:
            constants[parameter.name] = 1
        elif special and parameter.name not in constants and _aligned(value):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = "constexpr" if parameter.name in constants else _kind(value)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def widest(ptx: str) -> int:
    """Bytes that one thread reads or writes at once at most; 0 if it is one value at a time."""
    vectors = [int(count) * int(bits) // 8 for count, bits in VECTOR.findall(ptx)]
    return max([*vectors, *(int(size, 16) for size in COPY.findall(ptx))], default=0)


def _constants(kernel: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    return {
        parameter.name: arguments[parameter.num]
        for parameter in kernel.params
        if parameter.is_constexpr
    }


def _aligned(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("capabilities", nargs="+", type=int, help="such as 80 90")
    options.add_argument("--types", nargs="*", default=["fp16", "bf16", "fp32"], help="of tokens")
    options.add_argument("--operators", nargs="*", default=[], help="by torch name; default: all")
    args = options.parse_args(argv)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        wanted = TYPES[dtype] in args.types
        for launch in launches(dtype, args.operators) if wanted else ():
            for capability in args.capabilities:
                made = code(launch, capability)
                size, shared = len(made.asm["cubin"]), made.metadata.shared
                row = (TYPES[dtype], f"sm_{capability}", size, shared, widest(made.asm["ptx"]))
                print(launch[0].__name__, *row, flush=True)


if __name__ == "__main__":
    main()
