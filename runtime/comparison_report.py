"""A comparison with what it was asked for, in words and as a folder: table, chart and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thresher.compiler.files import atomic_folder
from thresher.runtime.comparing import Comparison, Verdict
from thresher.runtime.comparison_chart import comparison_chart
from thresher.runtime.deviation import plain
from thresher.runtime.tables import comparison, markdown

RECORD, CHART, PAGE = "compare.json", "compare.png", "compare.md"
LEGEND = (
    "work left: share of the multiply-accumulates asked for / spent; change: paired difference to"
    " dense ± its standard error; flips: answers that became worse and better; over {control}: standard"
    " errors by which a row beats (+) or loses to (-) the control at the same budget; of ideal:"
    " measured speed-up (interval of the median) / ideal; ms: of a batch of {batch}"
)


@dataclass(frozen=True)
class Report:
    """``quality`` says what was scored, ``command`` how to repeat it; ``weights`` of the model."""

    found: Comparison
    source: str
    quality: str
    command: str
    weights: str
    verdict: Verdict | None = None

    @property
    def title(self) -> str:
        """What was compared and by which measure."""
        return f"{self.source}, target {self.found.target}; {self.quality}"

    def sentences(self) -> list[str]:
        """Refusals, the verdict, what numbers mean, and the conditions."""
        found = self.found
        said = [f"{row.name}: refused, {row.refused}" for row in found.rows if row.refused]
        said += [f"{row.name}: {row.note}" for row in found.rows if row.note]
        if self.verdict is not None:
            said.append(self.verdict.sentence)
        if found.rows[0].scores:
            said.append(LEGEND.format(control=found.control, batch=found.batch))
        if self.weights == "random":
            said.append("random weights: times hold, quality means nothing")
        return [*said, *found.notes, conditions_text(found)]

    def to_json(self) -> dict[str, Any]:
        """Plain data under a versioned schema."""
        asked = {
            "source": self.source,
            "weights": self.weights,
            "quality": self.quality,
            "command": self.command,
            "verdict": plain(asdict(self.verdict)) if self.verdict else None,
        }
        return self.found.to_json() | asked

    def page(self) -> str:
        """Markdown: command, conditions, table."""
        notes = "\n".join(f"- {sentence}" for sentence in self.sentences())
        table = markdown(*comparison(self.found))
        head = f"# {self.title}\n\n    {self.command}\n"
        return f"{head}\n{table}\n\n![Quality against measured time]({CHART})\n\n{notes}\n"

    def write(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write the folder, whole or not at all.

        Raises:
            UsageError: the folder is taken or cannot be written.
            MissingRequirementError: matplotlib is not installed.
        """
        with atomic_folder(folder, overwrite=overwrite) as partial:
            (partial / RECORD).write_text(json.dumps(self.to_json(), indent=2))
            (partial / CHART).write_bytes(comparison_chart(self.found, self.title))
            (partial / PAGE).write_text(self.page())


def conditions_text(found: Comparison) -> str:
    """Where and how it was measured."""
    where = found.conditions
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    load = [f"{x:.1f}" if x is not None else "?" for x in (where.load_before, where.load_after)]
    timing = found.rows[0].time
    times = f"; {timing.latency.n} interleaved rounds at batch {found.batch}" if timing else ""
    return (
        f"{where.cpu}, {where.threads} threads of {where.usable} cores, load {load[0]} to"
        f" {load[1]}; {found.target}, {found.precision}{times}; {versions}"
    )
