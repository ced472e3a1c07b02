"""Engines: export, load, run, verify, profile and compare.

Names are imported when first used, so that loading and running an engine needs neither torch nor
any back end but its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.runtime.backends import TARGETS, Availability, Backend, backend
    from thresher.runtime.blocks import block_profiles, compare_blocks
    from thresher.runtime.bundle import package
    from thresher.runtime.comparing import Comparison, compare
    from thresher.runtime.engine import Engine
    from thresher.runtime.exporting import export
    from thresher.runtime.manifest import Manifest
    from thresher.runtime.profiling import Profile, profile
    from thresher.runtime.report import write_report
    from thresher.runtime.runner import ProgramRunner, Runnable
    from thresher.runtime.verifying import Verification, verify

__all__ = [
    "TARGETS",
    "Availability",
    "Backend",
    "Comparison",
    "Engine",
    "Manifest",
    "Profile",
    "ProgramRunner",
    "Runnable",
    "Verification",
    "backend",
    "block_profiles",
    "compare",
    "compare_blocks",
    "export",
    "package",
    "profile",
    "verify",
    "write_report",
]

_HOME = {
    "TARGETS": "backends",
    "Availability": "backends",
    "Backend": "backends",
    "backend": "backends",
    "Comparison": "comparing",
    "compare": "comparing",
    "Engine": "engine",
    "Manifest": "manifest",
    "Profile": "profiling",
    "profile": "profiling",
    "ProgramRunner": "runner",
    "Runnable": "runner",
    "Verification": "verifying",
    "verify": "verifying",
    "block_profiles": "blocks",
    "compare_blocks": "blocks",
    "export": "exporting",
    "package": "bundle",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
