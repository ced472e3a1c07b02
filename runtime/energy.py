"""Energy from the processor's own counters (RAPL), through Linux' powercap interface.

``/sys/class/powercap/intel-rapl:N/energy_uj`` counts microjoules of package N and starts again at
``max_energy_range_uj`` (Documentation/power/powercap in the kernel); AMD processors use the same name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thresher.compiler.errors import MissingRequirementError

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"intel-rapl:\d+")
SECONDS = 0.5  # of work for one reading; the counters move about once a millisecond


@dataclass(frozen=True)
class Counter:
    """One package's counter; ``span`` is where it starts again, in microjoules."""

    file: Path
    span: int

    def read(self) -> int:
        """Microjoules so far."""
        return int(self.file.read_text())


def counters(root: Path = POWERCAP) -> list[Counter]:
    """The counters of all packages.

    Raises:
        MissingRequirementError: there are none, or they may not be read.
    """
    zones = sorted(zone for zone in root.glob("*") if PACKAGE.fullmatch(zone.name))
    if not zones:
        raise MissingRequirementError(f"energy cannot be read: {root} has no RAPL counters")
    found = []
    for zone in zones:
        file = zone / "energy_uj"
        try:
            counter = Counter(file, int((zone / "max_energy_range_uj").read_text()))
            counter.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MissingRequirementError(
                f"energy cannot be read: {file} ({reason}); reading it usually needs root"
            ) from error
        found.append(counter)
    return found


def joules(
    call: Callable[[], object],
    zones: list[Counter],
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Joules of one call, of all packages together, whatever else runs on them included."""
    before, start, runs = [zone.read() for zone in zones], clock(), 0
    while not runs or clock() - start < seconds:
        call()
        runs += 1
    spent = [(z.read() - b) % z.span for z, b in zip(zones, before, strict=True)]
    return sum(spent) / 1e6 / runs
