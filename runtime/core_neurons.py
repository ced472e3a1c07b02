"""Core neurons that two forms of a model picked for one prompt, paired by their weights.

Rounding decides between neurons that matter nearly equally, and puts them in another order: what
is handed on is a set, and is compared as one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from thresher.compiler.handed import CORE
from thresher.runtime.feeds import Array

LOOKED_AT = 256  # neurons of each network


def pairs(a: Mapping[str, Array], b: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """By network (``core.3``), some neurons ``[n, weights]`` of ``a`` and the one of ``b`` nearest to each.

    Evenly spaced in the order of what they matter, so that those on the edge of the set are among
    them.  A neuron's row holds all of its weights, those that make it and those that read it.
    """
    ours, theirs = _rows(a), _rows(b)
    found = {}
    for name, rows in ours.items():
        count = min(len(rows), LOOKED_AT)
        some, others = rows[np.linspace(0, len(rows) - 1, count).astype(int)], theirs[name]
        distance = (others * others).sum(1) - 2 * some @ others.T  # and |a|^2, alike for all
        found[name] = some, others[distance.argmin(1)]
    return found


def _rows(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """``[K, weights]`` float32 by network, from ``up [D, K]``, ``bias [K]`` and ``down [K, O]``."""
    parts: dict[str, list[Array]] = {}
    for name in sorted(outputs):
        if name.startswith(CORE):
            network, _, what = name.removeprefix(CORE).partition(".")
            rows = outputs[name] if what == "down" else outputs[name].T
            flat = rows.reshape(len(rows), -1).astype(np.float32)
            parts.setdefault(f"{CORE}{network}", []).append(flat)
    return {name: np.concatenate(rows, axis=1) for name, rows in parts.items()}
