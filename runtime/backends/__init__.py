"""Back ends by target name.  Each is one file; importing this package loads none of them."""

from __future__ import annotations

import importlib

from thresher.compiler.errors import UsageError, nearest
from thresher.runtime.backends.base import Array, Availability, Backend, Feeds, Problem, Session

__all__ = ["TARGETS", "Array", "Availability", "Backend", "Feeds", "Problem", "Session", "backend"]

TARGETS = {
    "cpu": "thresher.runtime.backends.cpu:OnnxRuntime",
    "openvino": "thresher.runtime.backends.openvino:OpenVino",
}


def backend(target: str) -> Backend:
    """The back end of a target.

    Raises:
        UsageError: no such target; the nearest name is given.
    """
    if target not in TARGETS:
        raise UsageError(f"there is no target {target!r}{nearest(target, TARGETS)}")
    module, _, name = TARGETS[target].partition(":")
    made = getattr(importlib.import_module(module), name)()
    assert isinstance(made, Backend)
    return made
