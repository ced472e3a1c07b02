"""One Markdown table and one JSON file of finished studies."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.common import Study
from thresher.compiler.files import atomic_file
from thresher.runtime.comparison_report import conditions_text
from thresher.runtime.tables import comparison, markdown


def page(study: Study) -> str:
    """The table with its title and notes."""
    found = study.found
    lines = [f"### {study.title}", "", markdown(*comparison(found)), ""]
    lines += [f"- {row.name}: refused, {row.refused}" for row in found.rows if row.refused]
    lines += [f"- {note}" for note in [*study.notes, *found.notes, conditions_text(found)]]
    return "\n".join(lines)


def as_json(study: Study) -> dict[str, Any]:
    """Plain data under a versioned schema; per-item values stay out."""
    return {"title": study.title, **study.found.to_json(), "remarks": study.notes}


def finish(studies: Sequence[Study], args: argparse.Namespace) -> None:
    """Print the tables and write the JSON file, if one was asked for."""
    print("\n\n".join(page(study) for study in studies), flush=True)
    if args.json is not None:
        with atomic_file(args.json) as target:
            target.write_text(json.dumps([as_json(study) for study in studies], indent=2))
