"""``thresher recipes``: the built-in recipes, or one recipe written out."""

from __future__ import annotations

from typing import Annotated

import typer

from thresher.cli import options
from thresher.cli.console import say, show, show_json, table
from thresher.cli.passes import options_text


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE", help="A recipe to check and write out in full as YAML."
        ),
    ] = None,
    settings: options.Settings = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """List the built-in recipes, or write one out with all its options."""
    from thresher.compiler.recipe import built_in, load_recipe

    if name is not None:
        recipe = load_recipe(name, settings or ())
        if json:
            show_json("recipes", {"recipe": recipe.plain(), "origin": recipe.origin})
        else:
            say(f"# {recipe.origin}")
            print(recipe.to_yaml(), end="")
        return
    found = {one: load_recipe(one) for one in built_in()}
    if json:
        show_json("recipes", {"recipes": {one: recipe.plain() for one, recipe in found.items()}})
        return
    rows = [
        (
            one,
            recipe.summary,
            "\n".join(
                f"{entry.name} {options_text(entry.options.model_dump(exclude_defaults=True))}"
                for entry in recipe.passes
            ),
        )
        for one, recipe in found.items()
    ]
    show(table("Recipes", ("name", "summary", "passes"), rows))
