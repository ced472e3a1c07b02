"""The native kernel of ``sparse_linear`` against ONNX Runtime's dense MatMul, weights read from memory.

A model holds as many layers of one size as exceed the caches, all fed by one input, which is new in
every run: so no layer finds its weights or its active rows in a cache.  Times are of one layer.  Up to 8
tokens skip, as prompts are branches of their own, with packed weights, in an engine for ``cpu``.

    python -m tests.benchmarks.sparse_linear [--rounds 20] [--threads 1 2] [--megabytes 1000]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.helper as make
import onnx.numpy_helper
import onnx_ir as ir

from tests.benchmarks.common import say
from thresher.compiler.lowering import branch_prompts
from thresher.kernels.native import Library
from thresher.kernels.registry import DOMAIN, VERSION
from thresher.runtime.backends.onnx_runtime import CPU, session_options
from thresher.runtime.conditions import conditions, load_average
from thresher.runtime.measure import Plan, interleave, warm_up
from thresher.runtime.stats import paired_ratio
from thresher.runtime.tables import markdown

OPSET = 20
MATMUL = "MatMul"
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9, 0.95)


class Case(NamedTuple):
    """A layer, how many tokens pass it at a time, and which operator takes them."""

    inputs: int
    outputs: int
    tokens: int = 1
    operator: str = "SparseLinear"


CASES = (
    Case(4096, 11008),
    Case(11008, 4096),
    Case(768, 3072),
    Case(3072, 768),
    Case(4096, 11008, operator="SparseLinearBf16"),
    Case(768, 3072, operator="SparseLinearBf16"),
    Case(768, 3072, 2),
    Case(768, 3072, 4),
    Case(768, 3072, 8),
    Case(768, 3072, 16),
    Case(768, 3072, 64),
    Case(768, 3072, 256),
    Case(576, 960),  # from here on those of SmolLM2-135M: q, k and v
    Case(576, 576),
    Case(576, 3072),  # gate and up
    Case(1536, 576),
)


def layers(case: Case, operator: str, count: int) -> bytes:
    """A model of ``count`` such layers beside each other, without function bodies."""
    rng = np.random.default_rng(0)
    kind = onnx.TensorProto.FLOAT
    floats: dict[str, list[int | str]] = {"x": ["tokens", case.inputs]}
    if operator != MATMUL:
        floats["threshold"] = [case.inputs]
    nodes, weights, results = [], [], []
    for i in range(count):
        weight = rng.standard_normal((case.inputs, case.outputs), np.float32)
        if operator == "SparseLinearBf16":
            packed = (weight.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            held = make.make_tensor(f"w{i}", onnx.TensorProto.BFLOAT16, weight.shape, packed, True)
        else:
            held = onnx.numpy_helper.from_array(weight, f"w{i}")
        weights.append(held)
        inputs = ["x", f"w{i}", *list(floats)[1:]]
        if operator == MATMUL:
            nodes.append(make.make_node(MATMUL, inputs, [f"y{i}"]))
        else:
            nodes.append(make.make_node(operator, inputs, [f"y{i}"], domain=DOMAIN, most_tokens=8))
        results.append(make.make_tensor_value_info(f"y{i}", kind, ["tokens", case.outputs]))
    given = [make.make_tensor_value_info(n, kind, shape) for n, shape in floats.items()]
    opsets = [make.make_opsetid("", OPSET), make.make_opsetid(DOMAIN, VERSION)]
    graph = make.make_graph(nodes, operator, given, results, weights)
    model = ir.from_proto(make.make_model(graph, opset_imports=opsets, ir_version=10))
    branch_prompts(model)
    return bytes(ir.to_proto(model).SerializeToString())


def calls(case: Case, threads: int, megabytes: int) -> tuple[list[Callable[[], Any]], int]:
    """The dense model, then the sparse one at each sparsity; and how many layers they have."""
    import onnxruntime as ort

    count = max(1, -(-megabytes * 10**6 // (4 * case.inputs * case.outputs)))
    library = Library().find() or Library().build()
    rng = np.random.default_rng(1)
    fresh = itertools.cycle(
        [rng.standard_normal((case.tokens, case.inputs), np.float32) for _ in range(64)]
    )
    dense, sparse = (
        ort.InferenceSession(
            layers(case, name, count), session_options(threads, library), providers=[CPU]
        )
        for name in (MATMUL, case.operator)
    )

    def call(session: Any, **feeds: Any) -> Any:
        return session.run(None, {"x": next(fresh), **feeds})

    limits = [float(np.quantile(np.abs(rng.standard_normal(10**6)), s)) for s in SPARSITIES]
    thresholds = [np.full(case.inputs, limit, np.float32) for limit in limits]
    found: list[Callable[[], Any]] = [partial(call, dense)]
    found += [partial(call, sparse, threshold=threshold) for threshold in thresholds]
    return found, count


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads")
    options.add_argument("--rounds", type=int, default=20, help="timed rounds, at least 6")
    options.add_argument(
        "--megabytes", type=int, default=1000, help="float32 weights of all layers"
    )
    options.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help="which rows"
    )
    args = options.parse_args(argv)
    load, clock = load_average(), time.perf_counter
    plan = Plan(rounds=args.rounds, seconds=600.0, warm_up=6)
    rows = []
    for case in (CASES[i] for i in args.cases):
        for threads in args.threads:
            say(f"{case}, {threads} threads")
            timed, count = calls(case, threads, args.megabytes)
            dense, *sparse = interleave(
                timed, [warm_up(call, plan, clock) for call in timed], plan, clock
            )
            ratios = [paired_ratio(dense, times) for times in sparse]
            name = f"{case.inputs}x{case.outputs}{' bf16' if 'Bf16' in case.operator else ''}"
            microseconds = f"{1e6 * float(np.median(dense)) / count:.0f}"
            spoken = [f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})" for r in ratios]
            rows.append([name, str(case.tokens), str(threads), microseconds, *spoken])
            say(f"  {rows[-1]}")
    heads = [f"s = {sparsity:g}" for sparsity in SPARSITIES]
    print(markdown(["in x out", "tokens", "threads", "dense us", *heads], rows))
    where = conditions(max(args.threads), load)
    print(f"\n- {where.cpu}, {where.usable} cores, load {load or 0:.1f}")


if __name__ == "__main__":
    main()
