"""``thresher plan``: a dry run, with every problem at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from thresher.cli import options
from thresher.cli.console import progress, show, show_json, table
from thresher.cli.explain import REFUSED
from thresher.cli.opening import open_data, open_program
from thresher.cli.passes import as_json, foreseen, foresight, pass_table, refusal_table, warn
from thresher.compiler.errors import RefusedError

if TYPE_CHECKING:
    from thresher.compiler.program import PassRecord, Program
    from thresher.compiler.recipe import Recipe
    from thresher.runtime.backends import Problem


def plan(
    source: options.Source,
    recipe: options.Recipe = options.DEFAULT_RECIPE,
    settings: options.Settings = None,
    flops: options.Flops = None,
    speedup: options.Speedup = None,
    data: options.Data = None,
    target: options.Target = "cpu",
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Say what a recipe would do to a model and what the target takes, without doing it.

    Exit code 3 when a pass would apply nowhere or the target refuses a node.
    """
    with progress() as tell:
        from thresher.compiler.contract import Context
        from thresher.compiler.pipeline import check_order, explain
        from thresher.compiler.recipe import load_recipe
        from thresher.runtime.backends import backend

        maker = backend(target)
        chosen = load_recipe(recipe, options.overrides(settings, flops, speedup))
        chosen = chosen.rounding(maker.multiple)
        warn(chosen)
        program = open_program(source, options.wishes(weights, resolution, length), tell)
        check_order(chosen.build(), program)
        tell("asking the passes", 0, 0)
        context = Context(data=open_data(data, program.info, program.outputs), progress=tell)
        records = explain(program, chosen, context)
        tell(f"asking the target {target}", 0, 0)
        problems = untaken(program, maker)
    idle = idle_passes(chosen, records)
    accepted = not idle and not problems
    if json:
        show_json(
            "plan",
            {
                "source": source,
                "recipe": chosen.plain(),
                "accepted": accepted,
                "passes": as_json(records),
                "prediction": foreseen(records),
                "target": {"name": target, "problems": problems},
            },
        )
    else:
        show(pass_table(f"{chosen.name} on {source}", records))
        if any(record.refused for record in records):
            show(refusal_table(records))
        if problems:
            rows = [(p["node"], p["op"], p["reason"]) for p in problems]
            show(table(f"Not taken by {target}", ("node", "operator", "reason"), rows))
        show(*foresight(records), *_verdict(idle, problems, target))
    if not accepted:
        raise typer.Exit(REFUSED)


def idle_passes(recipe: Recipe, records: Sequence[PassRecord]) -> list[str]:
    """Passes that would apply nowhere though the recipe demands that they do."""
    pairs = zip(recipe.passes, records, strict=True)
    return [record.name for entry, record in pairs if not (record.applied or entry.allow_zero)]


def untaken(program: Program, maker: Any) -> list[dict[str, str]]:
    """Nodes of the lowered model that the back end refuses, as plain data."""
    from onnx_ir import to_proto

    from thresher.compiler.lowering import to_onnx

    try:
        found: list[Problem] = maker.problems(to_proto(to_onnx(program)))
    except RefusedError as error:
        return [{"node": "", "op": "", "reason": str(error)}]
    return [{"node": p.node, "op": p.op, "reason": p.reason} for p in found]


def _verdict(idle: list[str], problems: list[dict[str, str]], target: str) -> list[str]:
    said = [f"refused: {name} would apply nowhere, for the reasons above" for name in idle]
    if problems:
        said.append(f"refused: {target} does not take {len(problems)} nodes")
    return said or [f"accepted: every pass applies and {target} takes every node"]
