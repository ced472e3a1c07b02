"""Searched schedules where the schedule matters: the dense map of a DINOv2-S saliency model.

``tome`` with the same number at every block, more early, more late, and with counts that P-Sigmoid
found on 60 scenes; all judged on 200 other scenes.

    python -m tests.benchmarks.saliency_schedules [--budgets 0.5 0.4] [--trials 30] [--rounds 6]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks import zoo
from tests.benchmarks.common import parser, say, study
from tests.benchmarks.data import Scene, cut_outs
from tests.benchmarks.report import finish
from tests.benchmarks.saliency import MAP_SIZE, SCENES, localisation
from thresher.compiler.contract import Context
from thresher.compiler.pipeline import run
from thresher.compiler.program import Program
from thresher.compiler.recipe import Recipe, load_recipe
from thresher.passes.tokens.methods import Tome, TomeOptions
from thresher.passes.tokens.search.outcome import Counts, Outcome, Quality
from thresher.passes.tokens.search.psigmoid import PSigmoid
from thresher.passes.tokens.search.space import Space, space_of
from thresher.passes.tokens.search.strategy import Budget
from thresher.passes.tokens.search.study import Study
from thresher.runtime import ProgramRunner

SEARCHED = 60
SHAPES = {"early": -1.0, "late": 1.0}  # of tome's ``inflect``


class Objective:
    """IoU on the scenes of the search, run by torch."""

    def __init__(
        self, program: Program, space: Space, scenes: Sequence[Scene], threads: int
    ) -> None:
        self.program, self.space, self.scenes, self.threads = program, space, scenes, threads
        self.dense = self._score(program)

    def __call__(self, counts: Counts) -> Outcome:
        found = self._score(run(self.program, recipe_of(self.space, counts), Context()))
        return Outcome(Quality.paired(self.dense, found), self.space.share(counts))

    def _score(self, program: Program) -> NDArray[np.float64]:
        overlap, _ = localisation(ProgramRunner(program, threads=self.threads), self.scenes)
        return np.asarray(overlap.items, np.float64)


def recipe_of(space: Space, counts: Counts) -> Recipe:
    return load_recipe("tome", [space.option(counts)])


def searched(space: Space, objective: Objective, share: float, trials: int) -> Counts:
    """The best counts of a P-Sigmoid search at a share of the work."""
    strategy = PSigmoid(space, Budget.of(space, share, None))

    def observe(done: int, counts: Counts, found: Outcome) -> None:
        say(f"{share:.0%}: trial {done} of {trials}, IoU {found.quality.score:.4f}")

    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        study = Study(str(Path(folder, "study.journal")), "s", {"share": f"{share:g}"})
        known = study.run(strategy, objective, trials, observe)
    return max(known, key=lambda counts: known[counts].quality.score)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, limit=SCENES)
    options.add_argument("--trials", type=int, default=30, help="evaluations of each search")
    options.set_defaults(methods=["tome"], budgets=[0.5, 0.4])
    args = options.parse_args(argv)
    scenes = cut_outs(args.limit + SEARCHED, MAP_SIZE)
    judged, for_search = scenes[: args.limit], scenes[args.limit :]
    program = zoo.saliency(MAP_SIZE)
    space = space_of(program, Tome(TomeOptions()))
    objective = Objective(program, space, for_search, args.threads)
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        for share in args.budgets:
            made = {
                name: load_recipe("tome", [f"flops={share}", f"inflect={inflect}"])
                for name, inflect in SHAPES.items()
            }
            made["p-sigmoid"] = recipe_of(space, searched(space, objective, share, args.trials))
            for name, recipe in made.items():
                file = Path(folder, f"{name}-{share:g}.yaml")
                file.write_text(recipe.to_yaml())
                args.methods.append(str(file))
        found = study(
            f"DINOv2-S saliency model, {MAP_SIZE} px, dense map, {len(judged)} cut-outs, schedules",
            program,
            lambda runnable: localisation(runnable, judged),
            args,
            batch=1,
            notes=[f"searched on {len(for_search)} other scenes, {args.trials} trials each"],
        )
    finish([found], args)


if __name__ == "__main__":
    main()
