"""What a training is of: its checkpoint goes on only where all of this agrees."""

from __future__ import annotations

from typing import Any

from thresher.compiler import workers
from thresher.compiler.contract import Context
from thresher.compiler.digests import program_digest
from thresher.compiler.program import Program


def identity(program: Program, context: Context) -> dict[str, Any]:
    """Graph, passes behind it and weights as one digest; data, batch, seed and number of processes."""
    data = context.data
    return {
        "program": program_digest(program),
        "data": data.name if data else "",
        "items": len(data) if data else 0,
        "seed": context.seed,
        "batch": context.batch,
        "workers": workers.count(),
    }
