"""Energy counters, from files like those of the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from thresher.compiler.errors import MissingRequirementError
from thresher.runtime.energy import counters, joules


def zone(root: Path, name: str, energy: str = "0", span: str = "1000000000") -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(energy + "\n")
    (folder / "max_energy_range_uj").write_text(span + "\n")
    return folder / "energy_uj"


def ticks(step: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step


def test_only_packages_are_counted(tmp_path: Path) -> None:
    """A part of a package (``:0:0``) and other drivers would be counted twice."""
    for name in ("intel-rapl", "intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1", "dtpm"):
        zone(tmp_path, name)
    assert [c.file.parent.name for c in counters(tmp_path)] == ["intel-rapl:0", "intel-rapl:1"]


def test_joules_of_a_call_over_all_packages(tmp_path: Path) -> None:
    """Each call uses 3 and 2 joules; the second counter starts again at 10 joules."""
    first = zone(tmp_path, "intel-rapl:0", "5000000")
    second = zone(tmp_path, "intel-rapl:1", "9000000", span="10000000")

    def call() -> None:
        first.write_text(str(int(first.read_text()) + 3_000_000))
        second.write_text(str((int(second.read_text()) + 2_000_000) % 10_000_000))

    clock = ticks(0.2)
    used = joules(call, counters(tmp_path), seconds=0.5, clock=lambda: next(clock))
    assert used == pytest.approx(5.0)


def test_no_counters_are_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(MissingRequirementError, match="has no RAPL counters"):
        counters(tmp_path / "nothing")


def test_a_counter_that_is_no_number_is_said_plainly(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "secret")
    with pytest.raises(MissingRequirementError, match=r"energy cannot be read: .*needs root"):
        counters(tmp_path)
