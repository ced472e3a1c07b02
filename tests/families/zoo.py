"""Small instances of real architectures with random weights, for the family x method tests.

Every entry keeps the block structure of the named model (prefix tokens, positions, LayerScale,
norms, pooling) and shrinks width, depth and input, so that one forward takes milliseconds.  All
parameters are drawn anew, seeded: nothing is zero, one or constant, so no term of the network can
be lost unnoticed.  Models come in float64, the precision in which the oracle compares.
"""

from __future__ import annotations

from .cct import COMPACT
from .entry import Entry
from .hf_zoo import HUGGING_FACE
from .latents import LATENT
from .timm_zoo import TIMM

ENTRIES: tuple[Entry, ...] = (*TIMM, COMPACT, *LATENT, *HUGGING_FACE)
BY_NAME: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}
REDUCIBLE: tuple[Entry, ...] = tuple(entry for entry in ENTRIES if entry.refused is None)
REFUSED: tuple[Entry, ...] = tuple(entry for entry in ENTRIES if entry.refused is not None)
