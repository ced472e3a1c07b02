"""Depth of trained models: blocks left out, and tokens that skip them.

python -m tests.benchmarks.depth [--skip | --minilm] [--limit 500]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

from tests.benchmarks import fashion
from thresher.compiler.contract import Context
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program
from thresher.compiler.recipe import load_recipe
from thresher.models.data import Dataset
from thresher.runtime import ProgramRunner
from thresher.runtime.paired import Metric
from thresher.runtime.runner import Runnable

LEARNT_ON = 1000  # images at the end of the test set
TWEETS = 64  # of the training split
DROPPED = [
    *(f"part=block count={count}" for count in (1, 2, 3)),
    *(f"part=half count={count}" for count in (1, 2, 3, 4, 6)),
]
FEWER = ["part=block count=1", "part=block count=2", "part=half count=3"]
SKIPPED = [
    f"{where} router={router} items=96"
    for where in ("capacity=0.5", "part=ffn layers=1,2,3,4,5 capacity=0.4")
    for router in ("probe", "random")
]


def table(
    dense: Program,
    data: Dataset,
    score: Callable[[Runnable], list[Metric]],
    recipe: str,
    all_settings: Iterable[str],
) -> None:
    """Print the scores of a model, and those under a recipe with each of some settings."""

    def row(name: str, program: Program, told: str) -> None:
        metrics = ", ".join(f"{m.name} {m.value:.4f}" for m in score(ProgramRunner(program)))
        print(f"{name:50} {metrics} {told}", flush=True)

    row("dense", dense, "")
    for settings in all_settings:
        made = optimize(dense, load_recipe(recipe, settings.split()), Context(data=data))
        details = made.history[0].details
        share = details["macs"] / details["dense_macs"]
        row(settings, made, f"at {share:.1%} {details.get('dropped', '')}")


def images(limit: int, *, skip: bool) -> None:
    """The shipped ViT on Fashion-MNIST."""
    every, _ = fashion.test_set(10_000)
    last, scored = every[-LEARNT_ON:], min(limit, len(every) - LEARNT_ON)
    data = Dataset("images", LEARNT_ON, None, lambda chosen: {"images": last[list(chosen)]})
    recipe, settings = ("skip-tokens", SKIPPED) if skip else ("drop-blocks", DROPPED)
    table(fashion.program(), data, lambda r: fashion.accuracy(r, scored), recipe, settings)


def tweets(limit: int) -> None:
    """MiniLM on rated tweets."""
    from tests.benchmarks import zoo
    from tests.benchmarks.minilm import Rating, texts_to_learn

    rating = Rating(limit)
    data = texts_to_learn(rating.tokenizer, rating.train[0][:TWEETS])
    table(zoo.minilm(), data, rating, "drop-blocks", FEWER)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip", action="store_true", help="tokens skip instead of blocks going")
    parser.add_argument("--minilm", action="store_true", help="MiniLM instead of the shipped ViT")
    parser.add_argument("--limit", type=int, default=2000, help="items that are scored")
    args = parser.parse_args(argv)
    if args.minilm:
        tweets(args.limit)
    else:
        images(args.limit, skip=args.skip)


if __name__ == "__main__":
    main()
