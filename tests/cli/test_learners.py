"""Learners over the words of a text and the patches of an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.compiler.toys import WIDTH, Block
from tests.models.folders import tokenizer
from tests.passes.adaptive.test_acm import STEPS
from thresher.cli.draw import Heat, enlarge
from thresher.cli.learners import draw_words, heats, read_words, rows
from thresher.compiler.contract import Context
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models.data import Dataset
from thresher.passes.adaptive.acm import Acm
from thresher.passes.adaptive.job import AcmOptions
from thresher.passes.adaptive.runs import Runs


class Sentences(nn.Module):
    """A vector for each of up to any number of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(8, WIDTH), Block(), Block()

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(self.words(input_ids)))
        return found


def sentences(folder: Path) -> Program:
    torch.manual_seed(1)
    steps = {
        "kind": "text",
        "inputs": ["input_ids"],
        "max_length": 16,
        "tokenizer": str(tokenizer(folder)),
    }
    return trace(
        Sentences(),
        {"input_ids": torch.zeros(2, 6, dtype=torch.int64)},
        dynamic={"input_ids": {0: "batch", 1: "length"}},
        info=SourceInfo("sentences", preprocessing=steps),
    )


def test_the_words_of_a_text(tmp_path: Path) -> None:
    program = sentences(tmp_path)
    ids = np.random.default_rng(0).integers(2, 8, (10, 6))
    data = Dataset("ids", 10, None, lambda chosen: {"input_ids": ids[list(chosen)]})
    made = Acm(AcmOptions(**STEPS))(program, Context(data=data, batch=4)).program
    told, found = read_words(made, "very good film")
    assert [row["token"] for row in told] == ["[CLS]", "very", "good", "film", "[SEP]"]
    assert [len(row["learners"]) for row in told] == [2] * 5
    assert all(row["share"] == pytest.approx(sum(row["learners"]) / 8) for row in told)
    draw_words(tmp_path / "words.png", told, 4)
    assert (tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")
    assert [row["share"] for row in rows(found)] == pytest.approx(
        list(np.mean([row["learners"] for row in told], axis=0) / 4)
    )
    with pytest.raises(RefusedError, match="no adaptive networks, so there are no learners"):
        read_words(program, "very good")
    silent = replace(program, info=replace(program.info, preprocessing=None))
    with pytest.raises(UsageError, match="takes no text"):
        read_words(silent, "very good")


def test_the_patches_of_an_image() -> None:
    k = np.array(
        [[4, 0, 1, 2, -1]]
    )  # a class token, and 2 x 2 patches of which the last was dropped
    together, *each = heats([Runs("a", 4, k), Runs("b", 2, k.clip(-1, 2))], 1, 4, 4)
    np.testing.assert_allclose(together.share, np.array([[0, 2], [4, 0]]) / 6)
    np.testing.assert_allclose(each[0].share, [[0, 0.25], [0.5, 0]])
    assert "35%" in each[0].title


def test_colours_follow_the_share() -> None:
    share = np.array([[0.0, 1.0], [1.0, 0.0]])
    painted = Heat("t", share).painted(np.zeros((4, 4, 3)))
    bright = painted.sum(axis=2)
    np.testing.assert_array_equal(bright > bright.mean(), enlarge(share, (4, 4)) > 0.5)
