"""Whisper tiny.en: word errors of five clips, with fewer tokens for the decoder to attend to, and of fewer seconds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.data import RATE
from tests.benchmarks.short_clips import LONGEST, in_pieces, pieces
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


def test_pieces_are_cut_where_it_is_quiet_and_lose_nothing() -> None:
    samples = np.random.default_rng(0).standard_normal(12 * RATE).astype(np.float32)
    for pause in (3.0, 7.2):
        samples[int((pause - 0.2) * RATE) : int((pause + 0.2) * RATE)] *= 1e-3
    found = pieces(samples)
    np.testing.assert_array_equal(np.concatenate(found), samples)
    assert max(map(len, found)) <= LONGEST * RATE
    cuts = np.cumsum([len(piece) for piece in found])[:2] / RATE
    np.testing.assert_allclose(cuts, [3.0, 7.2], atol=0.2)


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


@pytest.mark.slow
def test_an_encoder_of_fewer_seconds_understands_short_clips_as_well() -> None:
    with packages("transformers", "safetensors"):
        from tests.benchmarks.data import librivox
        from tests.benchmarks.zoo_whisper import encoder, whisper

        clips, parts = librivox(), whisper()
    (dense,) = score(parts, ProgramRunner(parts.encoder, threads=1), clips, in_pieces)
    (short,) = score(parts, ProgramRunner(encoder(8), threads=1), clips, in_pieces)
    assert short.items.sum() <= dense.items.sum()
