"""``thresher plan``: a dry run, with every problem at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from thresher.cli import options
from thresher.cli.console import Progress, progress, say, show, show_json, table
from thresher.cli.explain import REFUSED
from thresher.cli.opening import at_once, open_measured, open_program
from thresher.cli.passes import as_json, foreseen, foresight, pass_table, refusal_table, warn

if TYPE_CHECKING:
    from rich.console import RenderableType

    from thresher.compiler.program import PassRecord, Program
    from thresher.compiler.recipe import Recipe
    from thresher.runtime.planning import Trouble

USAGE, ENVIRONMENT = 2, 4


def plan(
    source: options.Source,
    recipe: options.Recipe = options.DEFAULT_RECIPE,
    settings: options.Settings = None,
    flops: options.Flops = None,
    speedup: options.Speedup = None,
    budget: options.Budget = None,
    data: options.Data = None,
    target: options.Target = "cpu",
    precision: options.Precision = "fp32",
    shape: options.Shape = None,
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Say what a recipe would do to a model and whether the target could be built for, without doing it.

    Every problem is told at once. Exit code 3 when a pass would apply nowhere or the target refuses a
    node, else 2 for a shape or precision that it does not take, else 4 when something is missing here.
    """
    with progress() as tell:
        from thresher.compiler.contract import Context
        from thresher.compiler.pipeline import check_order, explain
        from thresher.compiler.recipe import load_recipe
        from thresher.runtime.backends import backend
        from thresher.runtime.planning import outlook

        maker = backend(target)
        chosen = load_recipe(recipe, options.overrides(settings, flops, speedup, budget))
        chosen = chosen.rounding(maker.multiple)
        warn(chosen)
        program = open_program(source, options.wishes(weights, resolution, length), tell)
        check_order(chosen.build(), program)
        tell("asking the passes", 0, 0)
        measured = None if data is None else open_measured(data, program)
        context = Context(data=measured, batch=at_once(program), progress=tell)
        records = explain(program, chosen, context)
        idle = idle_passes(chosen, records)
        reduced = program if idle else in_memory(program, chosen, tell)
        # A pass that was run behind the others knows more than one that was asked by itself.
        records = reduced.history[len(program.history) :] or records
        tell(f"asking the target {target}", 0, 0)
        found = outlook(reduced, maker, precision, shape or ())
    accepted = not idle and not found.troubles
    if json:
        memory = asdict(found.memory) if found.memory else None
        problems = [asdict(trouble) for trouble in found.troubles]
        show_json(
            "plan",
            {
                "source": source,
                "recipe": chosen.plain(),
                "accepted": accepted,
                "passes": as_json(records),
                "prediction": foreseen(records),
                "target": {
                    "name": target,
                    "problems": problems,
                    "memory": memory,
                    "needs": found.needs,
                },
            },
        )
    else:
        show(pass_table(f"{chosen.name} on {source}", records))
        if any(record.refused for record in records):
            show(refusal_table(records))
        if found.troubles:
            show(trouble_table(target, found.troubles))
        show(*foresight(records))
        if found.memory:
            show(f"memory: about {found.memory}")
        if found.needs:
            show(f"needed: {found.needs}")
        show(*_verdict(idle, found.troubles, target))
    if not accepted:
        raise typer.Exit(REFUSED if idle else worst(found.troubles))


def idle_passes(recipe: Recipe, records: Sequence[PassRecord]) -> list[str]:
    """Passes that would apply nowhere though the recipe demands that they do."""
    pairs = zip(recipe.passes, records, strict=True)
    return [record.name for entry, record in pairs if not (record.applied or entry.allow_zero)]


def in_memory(program: Program, recipe: Recipe, tell: Progress) -> Program:
    """The Program as the recipe makes it without data, so that the target is asked about that graph.

    Where a pass cannot do without, the Program as it is, and that is said.
    """
    from thresher.compiler.contract import Context
    from thresher.compiler.errors import UsageError
    from thresher.compiler.pipeline import optimize

    try:
        return optimize(program, recipe, Context(progress=tell))
    except UsageError as error:
        say(f"the target is asked about the model as it is: {error}")
        return program


def trouble_table(target: str, troubles: Sequence[Trouble]) -> RenderableType:
    """One row for each problem: where it is, why it is one, what to do."""
    rows = [(t.node or t.about, t.op, t.source, t.reason, t.remedy) for t in troubles]
    return table(f"In the way of {target}", ("at", "operator", "from", "reason", "remedy"), rows)


def worst(troubles: Sequence[Trouble]) -> int:
    """The exit code of several problems: refused before wrongly asked for before missing."""
    codes = {trouble.exit_code for trouble in troubles}
    return next(code for code in (REFUSED, USAGE, ENVIRONMENT) if code in codes)


def _verdict(idle: list[str], troubles: Sequence[Trouble], target: str) -> list[str]:
    said = [f"refused: {name} would apply nowhere, for the reasons above" for name in idle]
    nodes = sum(trouble.about == "node" for trouble in troubles)
    if nodes:
        said.append(f"refused: {target} does not take {nodes} nodes")
    said += [f"refused: {t.reason}: {t.remedy}" for t in troubles if t.about != "node"]
    return said or [f"accepted: every pass applies and {target} takes every node"]
