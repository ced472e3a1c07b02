"""The memory of this machine."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def free_memory() -> int | None:
    """Bytes that a new process can take without swapping (Linux: MemAvailable), or None elsewhere."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return int(found.split()[1]) * 1024 if found else None
