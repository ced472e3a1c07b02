"""Names by which the graphs of one model hand tensors to each other; importing this imports no torch."""

from __future__ import annotations

CORE = "core."  # what a graph of prompts gives and one of steps takes
LEAVES = "exit.leaves"  # bool [B]: items that are answered by the first graph
HANDED = "exit.handed."  # what the first graph hands on to the rest: outputs there, inputs here
