"""``AdaptiveMLP``, its native kernel and its body, against a dense network cut into the same learners.

Width 768, four learners of 768 neurons; every token runs a binomial number of them.  Realised over
ideal: dense time over adaptive time, times the share of the learners that run.

    python -m tests.benchmarks.adaptive_mlp [--rounds 20] [--threads 1 2] [--tokens 197 788]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper as make
import onnx.numpy_helper

from tests.benchmarks.common import bound, say
from thresher.kernels.native import Library
from thresher.kernels.registry import DOMAIN, OPERATORS, VERSION
from thresher.runtime.backends.onnx_runtime import CPU, session_options
from thresher.runtime.conditions import conditions, load_average
from thresher.runtime.measure import Plan, interleave, warm_up
from thresher.runtime.stats import paired_ratio
from thresher.runtime.tables import markdown

OPSET, LEARNERS, WIDTH, HIDDEN = 20, 4, 768, 768
BUDGETS = (1.0, 0.75, 0.6, 0.5, 0.4, 0.25)
KIND: dict[str, Any] = {"learners": LEARNERS, "activation": "gelu"}


def weights() -> dict[str, np.ndarray]:
    """Of all learners, as the operator takes them."""
    rng = np.random.default_rng(0)
    up = rng.standard_normal((LEARNERS, WIDTH, HIDDEN), np.float32) / WIDTH**0.5
    down = rng.standard_normal((LEARNERS, HIDDEN, WIDTH), np.float32) / HIDDEN**0.5
    biases = {"b1": np.zeros((LEARNERS, HIDDEN), np.float32), "b2": np.ones(WIDTH, np.float32)}
    return {"w1": up, "w2": down, **biases}


def adaptive(tokens: int) -> bytes:
    """One node with its body; inputs x and k."""
    operator = OPERATORS["AdaptiveMLP"]
    node = make.make_node(operator.name, list(operator.inputs), ["y"], domain=DOMAIN, **KIND)
    return _model([node], weights(), tokens, [operator.function(OPSET, attributes=KIND)], k=True)


def dense(tokens: int) -> bytes:
    """The same learners one after another, for every token."""
    nodes, of_all = list[onnx.NodeProto](), weights()
    held = {"b2": of_all.pop("b2")}
    for n in range(LEARNERS):
        held |= {f"{name}_{n}": array[n] for name, array in of_all.items()}
        before, total = f"total{n - 1}" if n else "b2", "y" if n == LEARNERS - 1 else f"total{n}"
        nodes += [
            make.make_node("MatMul", ["x", f"w1_{n}"], [f"product{n}"]),
            make.make_node("Add", [f"product{n}", f"b1_{n}"], [f"sum{n}"]),
            make.make_node("Gelu", [f"sum{n}"], [f"hidden{n}"]),
            make.make_node("MatMul", [f"hidden{n}", f"w2_{n}"], [f"out{n}"]),
            make.make_node("Add", [before, f"out{n}"], [total]),
        ]
    return _model(nodes, held, tokens, [], k=False)


def _model(
    nodes: Sequence[onnx.NodeProto],
    held: dict[str, np.ndarray],
    tokens: int,
    functions: Sequence[onnx.FunctionProto],
    *,
    k: bool,
) -> bytes:
    shape, real = [1, tokens, WIDTH], onnx.TensorProto.FLOAT
    given = [make.make_tensor_value_info("x", real, shape)]
    if k:
        given.append(make.make_tensor_value_info("k", onnx.TensorProto.INT64, shape[:2]))
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = make.make_graph(
        nodes, "ffn", given, [make.make_tensor_value_info("y", real, shape)], constants
    )
    opsets = [make.make_opsetid("", OPSET), make.make_opsetid(DOMAIN, VERSION)]
    made = make.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return bytes(made.SerializeToString())


def calls(tokens: int, threads: int) -> tuple[list[Callable[[], Any]], list[float]]:
    """The dense network, then kernel and body at each budget; and the shares that they run."""
    import onnxruntime as ort

    library = Library().find() or Library().build()
    whole, *cut = (
        ort.InferenceSession(model, session_options(threads, kernels), providers=[CPU])
        for model, kernels in (
            (dense(tokens), None), (adaptive(tokens), library), (adaptive(tokens), None),
        )
    )  # fmt: skip
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, tokens, WIDTH), np.float32)
    chosen = [rng.binomial(LEARNERS, budget, (1, tokens)) for budget in BUDGETS]
    every = np.full((1, tokens), LEARNERS)
    (expected,) = whole.run(None, {"x": x})
    for one in cut:
        np.testing.assert_allclose(one.run(None, {"x": x, "k": every})[0], expected, atol=1e-3)
    made = [bound(whole, {"x": x})]
    made += [bound(one, {"x": x, "k": k}) for one in cut for k in chosen]
    return made, [float(k.mean()) / LEARNERS for k in chosen]


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads")
    options.add_argument("--tokens", type=int, nargs="+", default=[197, 788])
    options.add_argument("--rounds", type=int, default=20, help="timed rounds, at least 6")
    args = options.parse_args(argv)
    load, clock = load_average(), time.perf_counter
    plan = Plan(rounds=args.rounds, seconds=600.0, warm_up=6)
    rows = []
    for tokens in args.tokens:
        for threads in args.threads:
            say(f"{tokens} tokens, {threads} threads")
            timed, shares = calls(tokens, threads)
            warmed = [warm_up(call, plan, clock) for call in timed]
            whole, *cut = interleave(timed, warmed, plan, clock)
            ratios = [paired_ratio(whole, times) for times in cut]
            spoken = [
                f"{ratio.median:.2f} = {ratio.median * share:.2f}"
                for ratio, share in zip(ratios, shares * 2, strict=True)
            ]
            milliseconds = f"{1e3 * float(np.median(whole)):.2f}"
            for at, form in enumerate(("kernel", "body")):
                shown = spoken[at * len(shares) : (at + 1) * len(shares)]
                rows.append([str(tokens), str(threads), milliseconds, form, *shown])
                say(f"  {rows[-1]}")
    heads = [f"budget {budget:g}" for budget in BUDGETS]
    print(markdown(["tokens", "threads", "dense ms", "form", *heads], rows))
    where = conditions(max(args.threads), load)
    print(f"\n- {where.cpu}, {where.usable} cores, load {load or 0:.1f}")


if __name__ == "__main__":
    main()
