"""The memory and the processor of this machine."""

from __future__ import annotations

from pathlib import Path

MEMINFO, CPUINFO = Path("/proc/meminfo"), Path("/proc/cpuinfo")


def free_memory() -> int | None:
    """Bytes that a new process can take without swapping (Linux: MemAvailable), or None elsewhere."""
    found = next((size for key, size in _pairs(MEMINFO) if key == "MemAvailable"), None)
    return int(found.split()[0]) * 1024 if found else None


def processors() -> list[tuple[str, str]]:
    """What the system tells of each logical processor, in order (Linux; empty elsewhere)."""
    return _pairs(CPUINFO)


def lacks_vnni() -> bool:
    """Whether this is an x86 processor that sums products of 8-bit integers in 16 bits, which may overflow."""
    flags = dict(processors()).get("flags")
    return flags is not None and "vnni" not in flags


def _pairs(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, _, value in pairs]
