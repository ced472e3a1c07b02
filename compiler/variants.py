"""One model reduced by several methods at several budgets, with the reasons where that fails.

A method is a built-in recipe, a registered pass or a recipe file.  One that sets a budget of its
own, or takes none, is made once as it is; all others once for each share of the work.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler import registry
from thresher.compiler.errors import ThresherError, UsageError
from thresher.compiler.recipe import Recipe, built_in, load_recipe, parse_recipe

if TYPE_CHECKING:
    from thresher.compiler.contract import Context
    from thresher.compiler.program import PassRecord, Program

CONTROL = "random"  # the method that every other must beat
DENSE = "dense"
UNCHANGED = "its budget asks for no change"


@dataclass(frozen=True)
class Variant:
    """A method at a budget: the reduced Program, or the reason why there is none.

    Attributes:
        asked: share of the dense multiply-accumulates asked for; None: the method's own budget.
        share: share that is spent.
        tokens: counts at the input and after each block.
        note: what the passes want to be said about it.
    """

    method: str
    asked: float | None = None
    program: Program | None = None
    refused: str | None = None
    share: float | None = None
    tokens: tuple[int, ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        """``"tome 0.5"``."""
        return self.method if self.asked is None else f"{self.method} {self.asked:g}"

    @property
    def budget(self) -> float | None:
        """The share at which a control is a fair one."""
        return self.share if self.asked is None else self.asked


def variants(
    program: Program,
    methods: Sequence[str],
    shares: Sequence[float],
    context: Context | None = None,
    *,
    control: bool = True,
    overrides: Sequence[str] = (),
) -> list[Variant]:
    """Every method at every share, by falling share; methods that are wrong are found first.

    Args:
        program: the dense model.
        methods: names of recipes or passes, or recipe files.
        shares: of the dense multiply-accumulates, each in (0, 1].
        context: of the passes; its seed is also that of the control.
        control: add the random control at every budget that occurs.
        overrides: further options of every method, as ``option=value``.

    Raises:
        UsageError: a method is unknown or its recipe is wrong.
    """
    from thresher.compiler.contract import Context

    context, labels = context or Context(), _labels(methods)
    planned = [
        (method, asked, recipe)
        for method in methods
        for asked, recipe in _at_shares(method, shares, overrides, context.seed)
    ]
    made = []
    for index, (method, asked, recipe) in enumerate(planned):
        variant = Variant(labels[method], asked)
        context.progress(f"reducing: {variant.name}", index, len(planned))
        made.append(_reduce(program, recipe, variant, context))
    if control:
        done = {variant.asked for variant in made if variant.method == CONTROL}
        budgets = dict.fromkeys(variant.budget for variant in made)
        missing = [share for share in budgets if share is not None and share not in done]
        made += variants(program, [CONTROL], missing, context, control=False, overrides=overrides)
    made.sort(key=lambda variant: -(variant.budget or 0.0))
    return made


def reduced(program: Program, method: str, share: float, overrides: Sequence[str] = ()) -> Variant:
    """One method at one share; raises like :func:`variants`."""
    return variants(program, [method], [share], control=False, overrides=overrides)[0]


def _at_shares(
    method: str, shares: Sequence[float], overrides: Sequence[str], seed: int
) -> list[tuple[float | None, Recipe]]:
    """The recipe of a method at each share, or once where it has a budget already."""
    own = [*overrides, *([f"seed={seed}"] if method == CONTROL else [])]
    plain = _recipe(method, own)
    if any(getattr(entry.options, "flops", None) is not None for entry in plain.passes):
        return [(None, plain)]
    try:
        return [(share, _recipe(method, [*own, f"flops={share:.6g}"])) for share in shares]
    except UsageError:  # another budget is set, or no pass takes one
        return [(None, plain)]


def _labels(methods: Sequence[str]) -> dict[str, str]:
    """What methods are called: recipe files by their stems, unless two have the same."""
    short = {m: Path(m).stem if m.endswith((".yaml", ".yml")) else m for m in methods}
    taken = Counter(short.values())
    return {method: name if taken[name] == 1 else method for method, name in short.items()}


def _recipe(method: str, overrides: Sequence[str]) -> Recipe:
    if method in registry.names() and method not in built_in():
        text = f"name: {method}\npasses:\n  - {method}\n  - cleanup: {{allow_zero: true}}\n"
        return parse_recipe(text, f"pass {method}", overrides)
    return load_recipe(method, overrides)


def _reduce(program: Program, recipe: Recipe, variant: Variant, context: Context) -> Variant:
    from thresher.compiler.pipeline import run

    lenient = tuple(dataclasses.replace(entry, allow_zero=True) for entry in recipe.passes)
    recipe = dataclasses.replace(recipe, passes=lenient)
    try:
        made = run(program, recipe, context)
    except ThresherError as error:
        return dataclasses.replace(variant, refused=str(error))
    records = made.history[len(program.history) :]
    told = _told(records)
    if not told:
        return dataclasses.replace(variant, refused=_reason(records))
    return dataclasses.replace(
        variant,
        program=made,
        share=told[-1]["macs"] / told[0]["dense_macs"],
        tokens=next((tuple(d["tokens"]) for d in reversed(told) if "tokens" in d), ()),
        note="; ".join(_notes(recipe, told)),
    )


def _notes(recipe: Recipe, told: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What a reader of the result has to know."""
    if recipe.learned_on is not None:
        yield recipe.learned_on.warning()
    yield from (details["note"] for details in told if "note" in details)


def _told(records: Sequence[PassRecord]) -> list[dict[str, Any]]:
    """What the passes that made the model cheaper say about counts and cost."""
    return [record.details for record in records if record.applied and "macs" in record.details]


def _reason(records: Sequence[PassRecord]) -> str:
    """Why nothing was reduced: work of another kind was done, the first refusal, or nothing to do."""
    changed = [r.name for r in records if r.applied and not registry.load(r.name).allow_zero]
    if changed and not any("macs" in record.details for record in records):
        return "it makes no multiply-accumulates fewer: compare engines with verify and profile"
    reasons = [refusal.reason for record in records for refusal in record.refused]
    if reasons:
        return reasons[0]
    if any("macs" in record.details for record in records):
        return UNCHANGED
    return "it removes no tokens from this model"
