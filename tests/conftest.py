"""Lets the tests import ``thresher.*`` from a checkout that was never installed; keeps them small.

Environment variables are set before torch or ONNX Runtime is first imported.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TRITON_INTERPRET", "1")  # 0 on a machine with a GPU: tests/gpu/run_all.sh
# Whatever is built here is left alone; the kernels' own tests build them in a place of their own.
os.environ["THRESHER_KERNELS"] = "off"
os.environ["THRESHER_ENGINE_CACHE"] = "off"
os.environ["THRESHER_CACHE"] = str(Path.home() / ".cache" / "thresher" / "tests")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("thresher") is None:
    _package = types.ModuleType("thresher")
    _package.__path__ = [str(ROOT)]
    sys.modules["thresher"] = _package

# The checkout is on the path for ``tests``; nobody, transformers' search for a package "kernels"
# included, may find our folders there under their bare names.
for _init in ROOT.glob("*/__init__.py"):
    if _init.parent.name != "tests":
        sys.modules[_init.parent.name] = None  # type: ignore[assignment]

from tests import remembered  # noqa: E402
from thresher.compiler import trace as _tracing  # noqa: E402

_tracing.trace = remembered.remembering(_tracing.trace)
remembered.read_once()
