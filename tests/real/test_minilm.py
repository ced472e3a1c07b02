"""MiniLM on rated tweets: padding, pooling and symbolic lengths on a trained model."""

from __future__ import annotations

import numpy as np
import pytest

from tests.real.needs import packages
from thresher.compiler.pipeline import optimize
from thresher.compiler.recipe import load_recipe
from thresher.compiler.variants import reduced
from thresher.runtime import ProgramRunner

pytestmark = pytest.mark.slow


def test_ratings_are_predicted_with_and_without_merging() -> None:
    with packages("transformers", "sklearn", "scipy"):
        from tests.benchmarks import zoo
        from tests.benchmarks.minilm import Rating

        dense, rating = zoo.minilm(), Rating(300)
    spearman, polarity = rating(ProgramRunner(dense, threads=1))
    assert spearman.value == pytest.approx(0.82, abs=0.05)  # two standard errors of 300 tweets
    assert polarity.value == pytest.approx(0.904, abs=0.05)
    case = reduced(dense, "tome", 0.8)
    assert case.program is not None, case.refused
    merged, _ = rating(ProgramRunner(case.program, threads=1))
    assert merged.value >= spearman.value - 0.03


def test_ratings_are_predicted_without_the_block_of_least_influence() -> None:
    with packages("transformers", "sklearn", "scipy"):
        from tests.benchmarks import zoo
        from tests.benchmarks.minilm import Rating

        dense, rating = zoo.minilm(), Rating(300)
    spearman, polarity = rating(ProgramRunner(dense, threads=1))
    pruned = optimize(dense, load_recipe("drop-blocks", ["drop=2"]))
    found, kept = rating(ProgramRunner(pruned, threads=1))
    assert found.value >= spearman.value - 0.04
    assert kept.value >= polarity.value - 0.04


def test_class_attention_is_refused_as_the_model_pools_by_the_mean() -> None:
    with packages("transformers"):
        from tests.benchmarks import zoo

        dense = zoo.minilm()
    case = reduced(dense, "evit", 0.8)
    assert case.program is None
    assert "class token" in str(case.refused)


def test_two_guitars_are_closer_than_a_guitar_and_the_stock_market() -> None:
    with packages("transformers"):
        from tests.benchmarks import zoo
        from tests.benchmarks.minilm import embed, tokenizer

        runner = ProgramRunner(zoo.minilm(), threads=1)
        words = tokenizer()
    texts = ["A man plays the guitar.", "Someone is playing a guitar.", "The stock market fell."]
    vectors = embed(runner, words, texts)
    alike, unlike = np.dot(vectors[1:], vectors[0])
    assert alike > 0.7
    assert unlike < 0.2
