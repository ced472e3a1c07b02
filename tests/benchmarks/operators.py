"""The native kernel of ``bipartite_merge`` against its function body, by itself.

Times are of whole runs of one node, interleaved, into memory that is there already, as inside of a network; a
fifteenth of the tokens merges, one is protected.

    python -m tests.benchmarks.operators [--rounds 40] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks.common import bound, say
from tests.kernels.back_ends import model
from thresher.kernels.native import Library
from thresher.runtime.backends.onnx_runtime import CPU, session_options
from thresher.runtime.conditions import conditions, load_average
from thresher.runtime.measure import Plan, interleave, warm_up
from thresher.runtime.stats import paired_ratio
from thresher.runtime.tables import markdown

TYPES = ("float32", "float16")


class Case(NamedTuple):
    """Sizes of the tokens ``[batch, tokens, width]`` and of the keys ``[batch, heads, tokens, depth]``."""

    batch: int
    tokens: int
    width: int
    heads: int
    depth: int


CASES = (
    Case(1, 197, 384, 6, 64),
    Case(8, 197, 384, 6, 64),
    Case(1, 577, 768, 12, 64),
    Case(1, 1370, 384, 6, 64),
    Case(1, 4096, 384, 6, 64),
    Case(8, 197, 128, 4, 32),
)


def calls(case: Case, dtype: str, threads: int) -> list[Callable[[], Any]]:
    """Body and kernel, ready to run on the same inputs."""
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    batch, tokens, width, heads, depth = case
    feeds = {
        "x": rng.standard_normal((batch, tokens, width)).astype(dtype),
        "size": np.ones((batch, tokens), np.float32),
        "metric": rng.standard_normal((batch, heads, tokens, depth)).astype(dtype),
        "keep": np.array(tokens - tokens // 15),
    }
    made = model("BipartiteMerge", (3, 2, 4, 0), dtype, (("protected", 1),), 2)
    library = Library().find() or Library().build()
    found: list[Callable[[], Any]] = []
    for kernels in (None, library):
        session = ort.InferenceSession(
            made.SerializeToString(), session_options(threads, kernels), providers=[CPU]
        )
        found.append(bound(session, feeds))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--threads", type=int, default=2, help="CPU threads")
    options.add_argument("--rounds", type=int, default=40, help="timed rounds, at least 6")
    args = options.parse_args(argv)
    load, plan, clock = load_average(), Plan(rounds=args.rounds), time.perf_counter
    rows = []
    for dtype in TYPES:
        for case in CASES:
            say(f"{dtype} {case}")
            timed = calls(case, dtype, args.threads)
            body, kernel = interleave(
                timed, [warm_up(call, plan, clock) for call in timed], plan, clock
            )
            ratio = paired_ratio(body, kernel)
            microseconds = [f"{1e6 * float(np.median(times)):.0f}" for times in (body, kernel)]
            change = f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
            rows.append([f"{dtype} {list(case[:3])}", *microseconds, change])
    print(markdown(["tokens", "body us", "kernel us", "ratio"], rows))
    where = conditions(args.threads, load)
    print(f"\n- {where.cpu}, {args.threads} threads of {where.usable} cores, load {load or 0:.1f}")


if __name__ == "__main__":
    main()
