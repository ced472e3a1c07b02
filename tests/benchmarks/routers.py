"""Who skips: trained routers, probes and a random order on the shipped ViT at the same capacity.

Fitted and trained on the training split of Fashion-MNIST, judged on the first test images; no times.

    python -m tests.benchmarks.routers "capacity=0.5" [--train "steps=100"] [--limit 3000]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.benchmarks import fashion
from tests.benchmarks.adaptive import training_set
from tests.benchmarks.common import say
from thresher.compiler.contract import Context
from thresher.compiler.pipeline import optimize
from thresher.compiler.recipe import load_recipe
from thresher.runtime import ProgramRunner
from thresher.runtime.paired import Metric, difference

SEEDS = (0, 1)  # of the random orders
TOLD_EVERY = 20  # steps


def progress(what: str, done: int, total: int) -> None:
    """A line now and then."""
    if done % TOLD_EVERY == 0:
        say(f"{what} {done}/{total}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", help="options of skip-tokens that all rows share")
    parser.add_argument("--train", default="steps=100", help="options of the training")
    parser.add_argument("--limit", type=int, default=3000, help="images that are scored")
    args = parser.parse_args(argv)
    dense, data = fashion.program(), training_set()
    (reference,) = fashion.accuracy(ProgramRunner(dense), args.limit)
    print(f"dense {reference.value:.2%}", flush=True)
    rows = [("router=trained", args.train, 0), ("router=probe", "", 0)]
    rows += [("router=random", "", seed) for seed in SEEDS]
    first: Metric | None = None
    for router, more, seed in rows:
        settings = f"{args.settings} {router} {more}".split()
        context = Context(seed=seed, data=data, progress=progress)
        made = optimize(dense, load_recipe("skip-tokens", settings), context)
        details = made.history[0].details
        (found,) = fashion.accuracy(ProgramRunner(made), args.limit)
        first = first or found
        lost, behind = difference(found, reference), difference(found, first)
        print(
            f"{' '.join(settings)} seed={seed}: work {details['macs'] / details['dense_macs']:.1%},"
            f" accuracy {found.value:.2%}, to dense {lost.value:+.2%} ± {lost.error:.2%}"
            f" (-{lost.worse} +{lost.better}), to trained {behind.value:+.2%} ± {behind.error:.2%};"
            f" {details.get('note', '')} {details.get('explained', '')}",
            flush=True,
        )


if __name__ == "__main__":
    main()
