"""``thresher explain``: what a pass does, and why it would or would not fire on a model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli import options
from thresher.cli.console import progress, show, show_json, table
from thresher.cli.opening import open_program
from thresher.cli.passes import as_json, foresight, pass_table, refusal_table

if TYPE_CHECKING:
    from thresher.compiler.contract import Pass

REFUSED = 3


def explain(
    name: Annotated[str, typer.Argument(metavar="PASS", help="Name of a pass.")],
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help=f"Also try it on a model: {options.SOURCES}."),
    ] = None,
    settings: options.Settings = None,
    data: options.Data = None,
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Describe a pass and its options; given a SOURCE, say where it would fire and why not.

    Exit code 3 when it would fire nowhere.
    """
    from thresher.compiler.registry import load

    kind = load(name)
    if source is None:
        if json:
            show_json("explain", describe(kind))
        else:
            _show_pass(kind)
        return
    with progress() as tell:
        from thresher.cli.opening import at_once, open_measured
        from thresher.compiler.contract import Context
        from thresher.compiler.pipeline import explain as ask
        from thresher.compiler.recipe import parse_recipe

        recipe = parse_recipe(f"passes: [{name}]", f"pass {name}", settings or ())
        program = open_program(source, options.wishes(weights, resolution, length), tell)
        tell(f"asking {name}", 0, 0)
        measured = None if data is None else open_measured(data, program)
        context = Context(data=measured, batch=at_once(program), progress=tell)
        records = ask(program, recipe, context)
    if json:
        show_json("explain", {**describe(kind), "source": source, "found": as_json(records)[0]})
    else:
        show(pass_table(f"{name} on {source}", records))
        if records[0].refused:
            show(refusal_table(records))
        show(*foresight(records))
    if not records[0].applied:
        raise typer.Exit(REFUSED)


def describe(kind: type[Pass[Any]]) -> dict[str, Any]:
    """A pass as plain data: what it is, what it demands, its options."""
    return {
        "name": kind.name,
        "summary": kind.summary,
        "text": inspect.getdoc(kind),
        "requires": sorted(kind.requires),
        "ensures": sorted(kind.ensures),
        "needs_data": kind.needs_data,
        "trains": kind.trains,
        "options": kind.Options.model_json_schema()["properties"],
    }


def _show_pass(kind: type[Pass[Any]]) -> None:
    rows = [
        (
            name,
            _kind(field.annotation),
            "" if field.default is None else field.default,
            field.description,
        )
        for name, field in kind.Options.model_fields.items()
    ]
    show(f"{kind.name}: {kind.summary}", "", inspect.getdoc(kind) or "")
    if rows:
        show(table("Options", ("option", "type", "default", "meaning"), rows))


def _kind(annotation: Any) -> str:
    """``"int"``, ``"float"``, ``"list of int"``."""
    text = str(
        getattr(annotation, "__name__", annotation) if isinstance(annotation, type) else annotation
    )
    text = text.removesuffix(" | None").replace("tuple[", "list of ").replace(", ...]", "")
    return text
