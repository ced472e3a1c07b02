"""Whisper tiny.en on speech in pieces of less than 5 s: an encoder that reads fewer seconds than 30.

Clips are cut where they are quietest and their transcripts joined.  The encoder of fewer seconds has the first
positions only (``thresher export hf:DIR --length FRAMES``); methods then reduce the one of ``--merged`` seconds.

    python -m tests.benchmarks.short_clips [--seconds 10 8 7 6] [--merged 8]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tests.benchmarks.common import Steps, Study, parser
from tests.benchmarks.data import RATE, Clip, Floats, librivox, two_cities
from tests.benchmarks.report import finish
from tests.benchmarks.whisper import score
from tests.benchmarks.zoo_whisper import Whisper, encoder, whisper
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.variants import CONTROL, DENSE, Variant, variants
from thresher.runtime import compare
from thresher.runtime.conditions import load_average
from thresher.runtime.runner import Runnable

SHORTEST, LONGEST = 2.0, 4.9  # seconds of a piece, but for the last of a clip
WINDOW = RATE // 5  # samples whose energy tells how quiet a place is


def pieces(samples: Floats) -> list[Floats]:
    """Samples cut at the quietest places."""
    if len(samples) <= LONGEST * RATE:
        return [samples]
    energy = np.convolve(samples**2, np.ones(WINDOW), "same")
    first = int(SHORTEST * RATE)
    cut = first + int(energy[first : int(LONGEST * RATE)].argmin())
    return [samples[:cut], *pieces(samples[cut:])]


def in_pieces(parts: Whisper, runnable: Runnable, clip: Clip) -> str:
    """Transcripts of all pieces, joined."""
    return " ".join(parts.hear(runnable, piece) for piece in pieces(clip.samples))


def rows(
    parts: Whisper,
    seconds: Sequence[int],
    merged: int,
    methods: Sequence[str],
    budgets: Sequence[float],
) -> Iterator[Variant]:
    """Encoders of fewer seconds, and one of them reduced; shares are of the encoder of 30 s."""
    dense = total_macs(parts.encoder.graph)
    for length in seconds:
        short = encoder(length)
        share = total_macs(short.graph) / dense
        yield Variant(f"{length} s", program=short, share=share)
        if length != merged:
            continue
        for row in variants(short, methods, budgets, control=False, overrides=["restore=false"]):
            left = None if row.share is None else row.share * share
            yield dataclasses.replace(row, method=f"{length} s, {row.method}", share=left)


def main(argv: Sequence[str] | None = None) -> None:
    clips = [*librivox(), two_cities()]
    options = parser(__doc__, limit=len(clips))
    options.set_defaults(methods=["tome"], budgets=[0.8, 0.65])
    options.add_argument("--seconds", nargs="*", type=int, default=[10, 8, 7, 6])
    options.add_argument("--merged", type=int, default=8, help="the encoder that methods reduce")
    args = options.parse_args(argv)
    clips, parts, load = clips[: args.limit], whisper(), load_average()
    made = list(rows(parts, args.seconds, args.merged, args.methods, args.budgets))
    found = compare(
        [Variant(DENSE, program=parts.encoder, share=1.0), *made],
        lambda runnable: score(parts, runnable, clips, in_pieces),
        control=CONTROL,
        threads=args.threads,
        batch=args.batch or 1,
        rounds=args.rounds,
        eager=args.eager,
        load=load,
        progress=Steps("Whisper tiny.en, short clips"),
    )
    count = sum(len(pieces(clip.samples)) for clip in clips)
    notes = [f"{count} pieces; times are of the encoder alone"]
    finish([Study(f"Whisper tiny.en, pieces of at most {LONGEST} s", found, notes)], args)


if __name__ == "__main__":
    main()
