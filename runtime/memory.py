"""Peak memory of an engine, taken in a fresh process, where nothing else adds to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thresher.runtime.engine import Engine
from thresher.runtime.sample import random_inputs

RUNS = 3
MEANING = (
    "highest resident memory of a fresh process that loads the engine and runs it three times;"
    " 'own' leaves out what it held before loading (Python, numpy, the back end's library)"
)


@dataclass(frozen=True)
class Memory:
    """Bytes.  ``peak`` is the high-water mark, ``own`` that less what the bare process held."""

    peak: int
    own: int


def peak_memory(
    folder: Path,
    *,
    batch: int,
    threads: int,
    sizes: Mapping[str, int] | None = None,
    seconds: float = 300.0,
) -> Memory | None:
    """Measure an engine folder in a new Python process; None where it cannot be read."""
    code = "from thresher.runtime.memory import main; main()"
    arguments = [str(folder), str(batch), str(threads), json.dumps(dict(sizes or {}))]
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
        )
        return Memory(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return None


def main() -> None:
    """The fresh process: load, run, print one line of JSON."""
    folder, batch, threads, sizes = sys.argv[1:]
    from thresher.runtime import manifest as manifests
    from thresher.runtime.backends import backend

    backend(manifests.read(Path(folder)).target).demand()
    before = _resident("VmRSS")
    with Engine.load(folder, threads=int(threads)) as engine:
        feeds = random_inputs(
            engine.inputs, batch=int(batch), sizes=json.loads(sizes), ranges=engine.ranges
        )
        for _ in range(RUNS):
            engine.run(feeds)
        peak = _resident("VmHWM")
    print(json.dumps({"peak": peak, "own": max(0, peak - before)}))


def _resident(field: str) -> int:
    """Bytes.  Linux: of this program alone, unlike ``ru_maxrss``, which a child inherits."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
