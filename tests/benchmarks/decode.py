"""A language model's steps in a real text: a dense engine against others that skip weights, in turns.

    python -m tests.benchmarks.decode dense.engine teal.engine --text judge.txt [--threads 1 2]

Every round reads another token behind the same 256 tokens, so that what is active is what a text makes
active; the past is the dense engine's.  *bound* is Amdahl's for the share of the weights that skip and the
share of inputs that was asked for: what is gained if a skipped byte saves the time of a byte and all other
time is that of other weights.  A prompt of the same tokens is timed too.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from thresher.runtime import Engine
from thresher.runtime.conditions import conditions, load_average
from thresher.runtime.feeds import Array
from thresher.runtime.generate import Session
from thresher.runtime.measure import Plan, interleave, warm_up
from thresher.runtime.stats import milliseconds, paired_ratio
from thresher.runtime.tables import markdown

PAST = 256
Feeds: TypeAlias = Callable[[], Iterator[dict[str, Array]]]


def tokens_of(engine: Engine, text: Path, count: int) -> Array:
    """The first tokens of a text, ``[1, count]``."""
    tokenizer = Tokenizer.from_file(str(engine.folder / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text()).ids[:count]
    if len(ids) < count:
        raise SystemExit(f"{text} has {len(ids)} tokens and {count} are needed")
    return np.array([ids])


def prompt(ids: Array) -> dict[str, Array]:
    """What a graph takes besides the past."""
    return {"input_ids": ids, "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None]}  # fmt: skip


def steps(engine: Engine, ids: Array) -> Iterator[dict[str, Array]]:
    """One token behind the first 256, again and again; the tokens that follow in the text in turn."""
    session = Session(engine, 1)
    session.feed(ids[:, :PAST], np.ones((1, PAST), np.int64))
    told = {"attention_mask": np.ones((1, PAST + 1), np.int64), "position_ids": np.array([[PAST]])}
    for at in itertools.cycle(range(PAST, ids.shape[1])):
        yield {"input_ids": ids[:, at : at + 1], **told, **session.past}


def prompts(engine: Engine, ids: Array) -> Iterator[dict[str, Array]]:
    """The first 256 tokens with an empty past, again and again."""
    return itertools.repeat(prompt(ids[:, :PAST]) | Session(engine, 1).past)


def timed(engines: Sequence[Engine], feeds: Feeds, rounds: int) -> list[list[float]]:
    """Seconds of every engine and round; each engine meets the same inputs in the same order."""
    plan, clock = Plan(rounds=rounds, seconds=600.0, warm_up=6), time.perf_counter

    def call(engine: Engine) -> Callable[[], Any]:
        given = feeds()
        return lambda: engine.run(next(given))

    calls = [call(engine) for engine in engines]
    return interleave(calls, [warm_up(one, plan, clock) for one in calls], plan, clock)


def amdahl(share: float, k: float) -> float:
    """``1 / (1 - f + f / k)``: the gain of the whole, a share f of it k times as fast."""
    return 1 / (1 - share + share / k)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, time, and print a table."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("engines", type=Path, nargs="+", help="folders; the dense one first")
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--rounds", type=int, default=40, help="at least 6")
    options.add_argument("--share", type=float, default=0.79, help="of the weights that skip")
    options.add_argument("--skipped", type=float, default=0.5, help="share of the inputs")
    args = options.parse_args(argv)
    load, bound = load_average(), amdahl(args.share, 1 / (1 - args.skipped))
    rows = []
    for threads in args.threads:
        engines = [Engine.load(folder, threads=threads) for folder in args.engines]
        ids = tokens_of(engines[0], args.text, PAST + args.rounds)
        kinds: dict[str, tuple[Feeds, int]] = {
            "step": (partial(steps, engines[0], ids), args.rounds),
            "prompt": (partial(prompts, engines[0], ids), max(6, args.rounds // 4)),
        }
        for kind, (feeds, rounds) in kinds.items():
            found = timed(engines, feeds, rounds)
            for folder, times in zip(args.engines, found, strict=True):
                ratio = paired_ratio(found[0], times)
                told = f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
                of = (
                    f"{ratio.median / bound:.2f}"
                    if kind == "step" and times is not found[0]
                    else ""
                )
                median = milliseconds(float(np.median(times)))
                rows.append([folder.name, kind, str(threads), median, told, of])
        for engine in engines:
            engine.close()
    print(markdown(["engine", "", "threads", "ms", "times as fast", f"of {bound:.2f}"], rows))
    where = conditions(max(args.threads), load)
    print(f"\n- {where.cpu}, {where.usable} cores, load {load or 0:.1f}")


if __name__ == "__main__":
    main()
