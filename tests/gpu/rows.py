"""What a section of the report finds: rows of one table, and how times become one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from thresher.runtime.measure import Plan, interleave, warm_up
from thresher.runtime.stats import median_interval, paired_ratio

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Where a section runs.  ``dry``: tiny, on any machine, to see that the script itself works."""

    device: str
    dry: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.float16

    @property
    def batches(self) -> tuple[int, ...]:
        return (2,) if self.dry else (8, 64, 1)

    @property
    def plan(self) -> Plan:
        """Short: six rounds in a dry run, else up to 40 in four seconds."""
        if self.dry:
            return Plan(rounds=6, warm_up=1, sample=0.0)
        return Plan(rounds=40, seconds=4.0, sample=0.01)

    def clock(self) -> float:
        """Seconds at which everything that was launched before has ended."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Row:
    """A line of the table.  Times in ms; ``ratio`` is baseline over candidate, with its 95 % interval.

    ``ideal`` is the ratio of multiply-accumulates; ``passed`` is the verdict of a correctness check.
    """

    section: str
    case: str
    batch: int | None = None
    baseline: float | None = None
    candidate: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    ideal: float | None = None
    passed: bool | None = None
    note: str = ""

    def write(self, file: Path) -> None:
        """Append it, so that it is there even if the section does not reach its end."""
        with file.open("a") as rows:
            rows.write(json.dumps(asdict(self)) + "\n")

    @staticmethod
    def read(file: Path) -> list[Row]:
        """All rows of a file."""
        lines = file.read_text().splitlines() if file.is_file() else []
        return [Row(**json.loads(line)) for line in lines]


def timed(setting: Setting, calls: Sequence[Call]) -> list[list[float]]:
    """Seconds by call and round, interleaved."""
    warmth = [warm_up(call, setting.plan, setting.clock) for call in calls]
    return interleave(calls, warmth, setting.plan, setting.clock)


def compared(
    section: str, case: str, baseline: Sequence[float], candidate: Sequence[float], **more: Any
) -> Row:
    """The row of two timings of the same rounds."""
    ratio = paired_ratio(baseline, candidate)
    before, after = (1e3 * median_interval(times).median for times in (baseline, candidate))
    return Row(
        section, case, baseline=before, candidate=after, ratio=ratio.median, low=ratio.low,
        high=ratio.high, **more,
    )  # fmt: skip
