"""Whisper tiny.en: word errors of five clips, with fewer tokens for the decoder to attend to."""

from __future__ import annotations

import pytest

from tests.benchmarks.whisper import score, word_errors, words
from tests.real.needs import packages
from thresher.compiler.variants import reduced
from thresher.runtime import ProgramRunner


def test_word_errors_are_the_fewest() -> None:
    meant = words("He was not an ill-disposed young man, Mr. Dashwood!")
    assert meant[-2:] == ["mister", "dashwood"]
    assert word_errors(meant, meant).sum() == 0
    assert word_errors(["a", "x", "c", "d", "e"], ["a", "b", "c", "e"]).sum() == 2
    assert word_errors([], ["a", "b"]).sum() == 2
    assert word_errors(["a", "b"], ["b"]).sum() == 1


@pytest.mark.slow
def test_clips_are_understood_with_and_without_merging() -> None:
    with packages("transformers", "safetensors"):
        from tests.benchmarks.data import librivox
        from tests.benchmarks.zoo_whisper import whisper

        clips, parts = librivox(), whisper()
    (dense,) = score(parts, ProgramRunner(parts.encoder, threads=1), clips)
    assert dense.items.sum() == 3
    case = reduced(parts.encoder, "tome", 0.65, ["restore=false"])
    assert case.program is not None, case.refused
    (merged,) = score(parts, ProgramRunner(case.program, threads=1), clips)
    assert merged.items.sum() <= 6
