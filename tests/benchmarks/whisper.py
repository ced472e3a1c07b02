"""Token reduction on the encoder of Whisper tiny.en: word error rate on short and long clips.

The encoder is always padded to 30 s, and what is removed from it is also missing from the keys of
the decoder's cross-attention.  Seven windows are a smoke test, not a ranking.

    python -m tests.benchmarks.whisper [--limit 2] [--json FILE]
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.common import parser, say, study
from tests.benchmarks.data import RATE, Clip, librivox, two_cities
from tests.benchmarks.report import finish
from tests.benchmarks.zoo_whisper import LONGEST, Whisper, whisper
from thresher.runtime.paired import Metric
from thresher.runtime.runner import Runnable

CUT = 29 * RATE  # between two words of the long clip
SPOKEN = {"mr": "mister"}
Transcribe = Callable[[Whisper, Runnable, Clip], str]


def words(text: str) -> list[str]:
    """Lower case, without punctuation, abbreviations spoken out."""
    plain = re.sub(r"[^a-z' ]", " ", text.lower().replace("-", " "))
    return [SPOKEN.get(word, word) for word in plain.split()]


def word_errors(said: Sequence[str], meant: Sequence[str]) -> NDArray[np.int64]:
    """Errors at each meant word, of an alignment with the fewest (Levenshtein, by words).

    A word too many counts at the meant word before it, or at the first.
    """
    cost = np.zeros((len(meant) + 1, len(said) + 1), int)
    cost[:, 0], cost[0] = range(len(meant) + 1), range(len(said) + 1)
    for i, wanted in enumerate(meant, start=1):
        for j, heard in enumerate(said, start=1):
            swap = cost[i - 1, j - 1] + (heard != wanted)
            cost[i, j] = min(swap, cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    errors = np.zeros(len(meant), np.int64)
    i, j = len(meant), len(said)
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + (said[j - 1] != meant[i - 1]):
            i, j = i - 1, j - 1
            errors[i] += said[j] != meant[i]
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            errors[i] += 1
        else:
            j -= 1
            errors[max(i - 1, 0)] += 1
    return errors


def in_windows(parts: Whisper, runnable: Runnable, clip: Clip) -> str:
    """Transcript; a clip beyond 30 s in two windows."""
    windows = [clip.samples] if clip.seconds <= LONGEST else np.split(clip.samples, [CUT])
    return " ".join(parts.hear(runnable, samples) for samples in windows)


def score(
    parts: Whisper, runnable: Runnable, clips: Sequence[Clip], transcribe: Transcribe = in_windows
) -> list[Metric]:
    """Word error rates of the short clips together and of the long one."""
    start = time.perf_counter()
    errors = [word_errors(words(transcribe(parts, runnable, c)), words(c.words)) for c in clips]
    say(f"  {len(clips)} clips in {time.perf_counter() - start:.1f} s")
    short = [found for clip, found in zip(clips, errors, strict=True) if clip.seconds <= LONGEST]
    long = [found for clip, found in zip(clips, errors, strict=True) if clip.seconds > LONGEST]
    return [
        Metric(name, np.concatenate(group), larger_is_better=False)
        for name, group in (("WER LibriVox", short), ("WER Two Cities", long))
        if group
    ]


def main(argv: Sequence[str] | None = None) -> None:
    clips = [*librivox(), two_cities()]
    args = parser(__doc__, limit=len(clips)).parse_args(argv)
    parts = whisper()
    finish(
        [
            study(
                f"Whisper tiny.en encoder, {args.limit} clips",
                parts.encoder,
                lambda runnable: score(parts, runnable, clips[: args.limit]),
                args,
                batch=1,
                overrides=["restore=false"],
                notes=[
                    "restore=false: the decoder attends to the tokens that are left",
                    "71 and 119 words: a smoke test; errors and flips are counted by word, and"
                    " words of one clip are not independent: the standard errors are too small",
                    "times are of the encoder alone",
                ],
            )
        ],
        args,
    )


if __name__ == "__main__":
    main()
