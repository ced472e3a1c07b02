"""What is read of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from thresher.runtime import host
from thresher.runtime.host import free_memory, lacks_vnni, processors

OF_X86 = "processor\t: {}\nmodel name\t: One\nflags\t\t: fpu avx2{}\n\n"


@pytest.mark.parametrize(
    ("told", "lacks"),
    [
        (OF_X86.format(0, "") + OF_X86.format(1, ""), True),
        (OF_X86.format(0, " avx512_vnni"), False),
        (OF_X86.format(0, " avx_vnni"), False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        (None, False),
    ],
)
def test_processors_that_sum_integers_in_16_bits(
    told: str | None, lacks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if told is not None:
        file.write_text(told)
    monkeypatch.setattr(host, "CPUINFO", file)
    assert lacks_vnni() is lacks
    assert len([1 for key, _ in processors() if key == "processor"]) == (told or "").count("proc")


def test_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "meminfo"
    monkeypatch.setattr(host, "MEMINFO", file)
    assert free_memory() is None
    file.write_text("MemTotal:  9 kB\nMemAvailable:    7 kB\n")
    assert free_memory() == 7 * 1024
