"""Everything worth doing on a machine with an NVIDIA GPU, in under eight minutes: one table, one JSON file.

Each section runs in a process of its own with a budget of time, so that one that fails or hangs costs the
others nothing, and what it had found by then stays in the table.  Exit code 1 if a correctness check failed.

    bash tests/gpu/run_all.sh [--only eager,engines] [--json FILE]
    python -m tests.gpu.report --dry    # the script itself, tiny, on any machine
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.gpu.rows import Row, Setting
from thresher.compiler.files import atomic_file
from thresher.kernels.native import SWITCH
from thresher.runtime.manifest import installed
from thresher.runtime.tables import markdown

SCHEMA = "thresher.gpu-report/1"
ROOT = Path(__file__).parents[2]
STDERR = 2
TOTAL = 475.0  # seconds for all sections
PACKAGES = (
    "thresher",
    "torch",
    "triton",
    "timm",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
)


@dataclass(frozen=True)
class Section:
    """``seconds`` of ``TOTAL``; ``check``: a section that does not come to its end counts as failed."""

    seconds: float
    place: str
    check: bool = False

    def load(self) -> Callable[[Setting], Iterator[Row]]:
        module, _, name = self.place.partition(":")
        found: Callable[[Setting], Iterator[Row]] = getattr(import_module(module), name)
        return found


SECTIONS = {
    "correctness": Section(130, "tests.gpu.correctness:correctness", check=True),
    "eager": Section(80, "tests.gpu.models:eager", check=True),
    "networks": Section(20, "tests.gpu.networks:networks"),
    "operators": Section(60, "tests.gpu.operators:operators"),
    "engines": Section(110, "tests.gpu.engines:engines"),
    "compiled": Section(TOTAL, "tests.gpu.models:compiled"),  # whatever is left
}


def within(name: str, section: Section, seconds: float, options: Sequence[str]) -> list[Row]:
    """Run a section in a process of its own; its rows, and one more if it was not to its end."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "rows", Path(folder) / "log"
        command = [sys.executable, "-m", "tests.gpu.report", "--section", name, "--rows", str(file)]
        with log.open("w") as output:
            # Its rows are shown as they come: of a script that is ended early they are all there is.
            child = subprocess.Popen(
                [*command, *options], cwd=ROOT, stdout=STDERR, stderr=output, start_new_session=True
            )
            try:
                code = child.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)  # the section's own processes with it
                child.wait()
                code = None
        rows, said = Row.read(file), log.read_text().strip()
    print(said, file=sys.stderr, flush=True)
    if code == 0:
        return rows
    last = said.splitlines()[-1] if said else "no reason"
    note = f"ended after its {seconds:.0f} s" if code is None else f"failed: {last}"
    # Rows that are there stand; where none is, nothing was shown to be right.
    unshown = section.check and (code is not None or not any(row.passed for row in rows))
    return [*rows, Row(name, "not to its end", passed=False if unshown else None, note=note)]


def run_all(names: Sequence[str], total: float, options: Sequence[str]) -> list[Row]:
    """All sections in order; none is given more than its budget, in proportion to ``total``, or what is left."""
    start, rows = time.monotonic(), []
    for name in names:
        left = total - (time.monotonic() - start)
        seconds = min(SECTIONS[name].seconds * total / TOTAL, left)
        print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
        if seconds <= 0:
            rows.append(Row(name, "not begun", note="no time was left"))
            continue
        rows += within(name, SECTIONS[name], seconds, options)
    return rows


def hardware(device: str) -> dict[str, str]:
    """Name, memory and capability of the GPU, and the driver's version."""
    import torch

    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if device != "cuda":
        return {**found, "device": device}
    facts = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        **found,
        "device": facts.name,
        "memory": f"{facts.total_memory / 2**30:.0f} GiB",
        "capability": f"{facts.major}.{facts.minor}",
        "driver": driver,
        "CUDA": str(torch.version.cuda),
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line for each row."""
    head = ["section", "case", "batch", "baseline ms", "candidate ms", "ratio", "ideal", "note"]
    return markdown(head, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    verdict = {True: "passed", False: "FAILED", None: ""}[row.passed]
    ratio = f"{row.ratio:.2f} ({row.low:.2f}-{row.high:.2f})" if row.ratio is not None else ""
    return [
        row.section,
        row.case,
        "" if row.batch is None else str(row.batch),
        "" if row.baseline is None else f"{row.baseline:.3f}",
        "" if row.candidate is None else f"{row.candidate:.3f}",
        ratio,
        "" if row.ideal is None else f"{row.ideal:.2f}",
        ": ".join(filter(None, [verdict, row.note.replace("|", "/").replace("\n", " ")])),
    ]


def write(rows: Sequence[Row], facts: Mapping[str, Any], file: Path) -> None:
    """The same as JSON."""
    record = {"schema": SCHEMA, **facts, "rows": [asdict(row) for row in rows]}
    with atomic_file(file) as target:
        target.write_text(json.dumps(record, indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    options.add_argument("--seconds", type=float, default=TOTAL, help="for all sections")
    options.add_argument("--json", type=Path, default=None, help="also write the result here")
    options.add_argument("--dry", action="store_true", help="tiny, on the CPU: tests the script")
    options.add_argument("--section", default="", help=argparse.SUPPRESS)  # of a child
    options.add_argument("--rows", type=Path, default=None, help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.section:
        os.environ.pop(SWITCH, None)
        for row in SECTIONS[args.section].load()(Setting("cpu" if args.dry else "cuda", args.dry)):
            row.write(args.rows)
            print(*filter(None, _line(row)), sep=" | ", flush=True)
        return 0
    names = args.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        options.error(f"there is no section {unknown[0]!r}: {', '.join(SECTIONS)}")
    import torch

    device = "cpu" if args.dry else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        options.error("there is no CUDA device here; --dry tests the script without one")
    rows = run_all(names, args.seconds, ["--dry"] if args.dry else [])
    versions = {name: installed(name) for name in PACKAGES}
    facts = {"hardware": hardware(device), "versions": {k: v for k, v in versions.items() if v}}
    print(table(rows))
    for name, values in facts.items():
        print(f"- {name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    print(
        "- ratio: baseline over candidate, median of interleaved rounds with its 95 % interval; random weights"
    )
    if args.json is not None:
        write(rows, facts, args.json)
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
