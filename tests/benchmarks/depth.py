"""Depth of the shipped ViT: blocks left out, and tokens that skip them; accuracy on Fashion-MNIST.

python -m tests.benchmarks.depth [--skip] [--limit 500]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.benchmarks import fashion
from thresher.compiler.contract import Context
from thresher.compiler.pipeline import optimize
from thresher.compiler.recipe import load_recipe
from thresher.models.data import Dataset
from thresher.runtime import ProgramRunner

LEARNT_ON = 1000  # images at the end of the test set
DROPPED = [
    *(f"part=block count={count}" for count in (1, 2, 3)),
    *(f"part=half count={count}" for count in (1, 2, 3, 4, 6)),
]
SKIPPED = [
    f"{where} router={router} items=96"
    for where in ("capacity=0.5", "part=ffn layers=1,2,3,4,5 capacity=0.4")
    for router in ("probe", "random")
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip", action="store_true", help="tokens skip instead of blocks going")
    parser.add_argument("--limit", type=int, default=2000, help="images that are scored")
    args = parser.parse_args(argv)
    images, _ = fashion.test_set(10_000)
    last = images[-LEARNT_ON:]
    data = Dataset("images", LEARNT_ON, None, lambda chosen: {"images": last[list(chosen)]})
    dense = fashion.program()
    limit = min(args.limit, len(images) - LEARNT_ON)
    (found,) = fashion.accuracy(ProgramRunner(dense), limit)
    print(f"{'dense':50} {found.value:.2%}")
    name, all_settings = ("skip-tokens", SKIPPED) if args.skip else ("drop-blocks", DROPPED)
    for settings in all_settings:
        made = optimize(dense, load_recipe(name, settings.split()), Context(data=data))
        told = made.history[0].details
        (found,) = fashion.accuracy(ProgramRunner(made), limit)
        share = told["macs"] / told["dense_macs"]
        print(f"{settings:50} {found.value:.2%} at {share:.1%} {told.get('dropped', '')}")


if __name__ == "__main__":
    main()
