"""What passes did or would do, for people and for programs; several verbs print it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from thresher.cli.console import say, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from thresher.compiler.program import PassRecord, Refusal
    from thresher.compiler.recipe import Recipe

TOP = 2  # reasons shown in a row
WORTH_TELLING = 0.01  # share of what is left that the steps themselves take


def warn(recipe: Recipe) -> None:
    """Say what a recipe's counts were learned on, if they were."""
    if recipe.learned_on is not None:
        say(f"{recipe.name}: {recipe.learned_on.warning()}")


def pass_table(title: str, records: Sequence[PassRecord]) -> RenderableType:
    """One row for each pass."""
    head = ("pass", "options", "matched", "applied", "refused", "why", "seconds")
    rows = [
        (
            record.name,
            options_text(record.options),
            record.matched,
            record.applied,
            len(record.refused),
            top_reasons(record.refused),
            f"{record.seconds:.2f}",
        )
        for record in records
    ]
    return table(title, head, rows)


def refusal_table(records: Sequence[PassRecord]) -> RenderableType:
    """Every node that was left alone, with the reason."""
    rows = [(record.name, r.node, r.reason) for record in records for r in record.refused]
    return table("Refused", ("pass", "node", "reason"), rows)


def options_text(options: dict[str, Any]) -> str:
    """``r=13 inflect=1``; options without a value are left out."""
    return " ".join(f"{name}={value}" for name, value in options.items() if value is not None)


def top_reasons(refused: Sequence[Refusal]) -> str:
    """The most frequent reasons, with their counts."""
    counts = Counter(refusal.reason for refusal in refused).most_common()
    shown = [f"{count} x {reason}" if count > 1 else reason for reason, count in counts[:TOP]]
    rest = f"and {len(counts) - TOP} more" if len(counts) > TOP else ""
    return "; ".join(filter(None, [*shown, rest]))


def foreseen(records: Sequence[PassRecord]) -> dict[str, Any] | None:
    """Tokens after each block where they change, and MACs and ideal speed-up of all passes together, and of each
    that foresees one."""
    named = [(record.name, record.details) for record in records if "ideal" in record.details]
    if not named:
        return None
    told = [details for _, details in named]
    dense, macs = told[0]["dense_macs"], told[-1]["macs"]
    counts = [details["tokens"] for details in told if "tokens" in details]
    tokens = {"tokens": counts[-1]} if counts else {}
    by_pass = [[name, details["dense_macs"] / details["macs"]] for name, details in named]
    return {
        **tokens,
        "dense_macs": dense,
        "macs": macs,
        "ideal": dense / macs,
        "by_pass": by_pass,
    }


def foresight(records: Sequence[PassRecord]) -> list[str]:
    """The same as sentences."""
    notes = [record.details["note"] for record in records if "note" in record.details]
    found = foreseen(records)
    if found is None:
        return notes
    counts = [counts_text(found["tokens"])] if "tokens" in found else []
    factors = " x ".join(f"{ideal:.2f} by {name}" for name, ideal in found["by_pass"])
    shares = f" ({factors})" if len(found["by_pass"]) > 1 else ""
    steps = sum(record.details.get("inserted_macs", 0) for record in records)
    told = [steps] if steps > WORTH_TELLING * found["macs"] else []
    return [
        *notes,
        *(f"tokens at the input and after each block: {text}" for text in counts),
        f"predicted: {cost_text(found['dense_macs'], found['macs'])}{shares}",
        *(f"the steps themselves take {macs / 1e9:.3g} G more" for macs in told),
    ]


def counts_text(tokens: Sequence[int | str]) -> str:
    """``"197 184 171"``."""
    return " ".join(map(str, tokens))


def cost_text(dense: int, macs: int) -> str:
    """What a reduction saves, in words."""
    return (
        f"{dense / 1e9:.3g} G multiply-accumulates become {macs / 1e9:.3g} G,"
        f" an ideal speed-up of {dense / macs:.2f}"
    )


def as_json(records: Sequence[PassRecord]) -> list[dict[str, Any]]:
    """Plain data of every pass."""
    return [asdict(record) for record in records]
