"""One Markdown table and one JSON file of a finished study."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.common import CONTROL, Case, Difference, Study, difference
from thresher.compiler.files import atomic_file

BEATS = 2.0  # standard errors by which a method must clear the control


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    columns = [header, *rows]
    widths = [max(len(row[i]) for row in columns) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), "| " + " | ".join(rule) + " |", *map(line, rows)])


def against_control(study: Study, case: Case, index: int) -> Difference | None:
    """Paired difference from random dropping at the same budget."""
    control = study.case(CONTROL, case.flops)
    if case.method in ("dense", CONTROL) or control is None or not control.metrics:
        return None
    return difference(case.metrics[index], control.metrics[index])


def verdict(found: Difference | None, *, larger_is_better: bool) -> str:
    """Whether a method beats the control, with the distance in standard errors."""
    if found is None:
        return ""
    sigmas = found.sigmas if larger_is_better else -found.sigmas
    word = "yes" if sigmas > BEATS else "worse" if sigmas < -BEATS else "no"
    return f"{word} ({sigmas:+.1f})"


def markdown(study: Study) -> str:
    """The table with its title and notes."""
    dense = study.cases[0]
    header = ["method, flops", "tokens"]
    for metric in dense.metrics:
        header += [metric.name, "- dense", *(["flips"] if metric.decisions is not None else [])]
        header += [f"beats {CONTROL}?"]
    header += ["ideal", f"speed-up b{study.batch}", "realised", "ms"]
    rows = [_row(study, case, len(header)) for case in study.cases]
    lines = [f"### {study.title}", "", table(header, rows), ""]
    lines += [f"- {case.name}: refused, {case.refused}" for case in study.cases if case.refused]
    lines += [f"- {note}" for note in [*study.notes, _where(study)]]
    return "\n".join(lines)


def _row(study: Study, case: Case, width: int) -> list[str]:
    if case.refused:
        return [case.name, "refused", *[""] * (width - 2)]
    dense = study.cases[0]
    row = [case.name, f"{case.tokens[0]} to {case.tokens[-1]}" if case.tokens else "all"]
    for index, metric in enumerate(case.metrics):
        row.append(f"{metric.value:.4f}")
        change = None if case is dense else difference(metric, dense.metrics[index])
        row.append(f"{change.value:+.4f} ± {change.error:.4f}" if change else "")
        if metric.decisions is not None:
            row.append(str(change.flips) if change else "")
        control = against_control(study, case, index)
        row.append(verdict(control, larger_is_better=metric.larger_is_better))
    time = case.speedup or {}
    ratio = f"{time['ratio']:.2f} ({time['low']:.2f}-{time['high']:.2f})" if "ratio" in time else ""
    realised = f"{time['realised']:.2f}" if "realised" in time else ""
    spent = f"{time['milliseconds']:.1f}" if time else ""
    return [*row, f"{case.ideal:.2f}" if case.ideal else "", ratio, realised, spent]


def _where(study: Study) -> str:
    where = study.conditions
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['cpu']}, {where['threads']} threads of {where['usable']} cores, load"
        f" {where['load_before']} to {where['load_after']}; {versions}"
    )


def as_json(study: Study) -> dict[str, Any]:
    """Plain data under a versioned schema; per-item values stay out."""
    return {
        "schema": "thresher.benchmark/1",
        "title": study.title,
        "batch": study.batch,
        "notes": study.notes,
        "conditions": study.conditions,
        "cases": [_plain(study, case) for case in study.cases],
    }


def _plain(study: Study, case: Case) -> dict[str, Any]:
    dense = study.cases[0]
    scores = []
    for index, metric in enumerate(case.metrics):
        change = None if case is dense else difference(metric, dense.metrics[index])
        control = against_control(study, case, index)
        scores.append(
            {
                "name": metric.name,
                "value": metric.value,
                "items": len(metric.items),
                "against_dense": vars(change) if change else None,
                "against_random": vars(control) if control else None,
            }
        )
    return {
        "method": case.method,
        "flops": case.flops,
        "refused": case.refused,
        "tokens": case.tokens,
        "ideal": case.ideal,
        "metrics": scores,
        "speedup": case.speedup,
    }


def finish(studies: Sequence[Study], args: argparse.Namespace) -> None:
    """Print the tables and write the JSON file, if one was asked for."""
    print("\n\n".join(markdown(study) for study in studies), flush=True)
    if args.json is not None:
        with atomic_file(args.json) as target:
            target.write_text(json.dumps([as_json(study) for study in studies], indent=2))
