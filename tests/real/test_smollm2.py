"""SmolLM2-135M-Instruct: the published perplexity protocol, and its answer to a question."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.data import editorials
from tests.real.needs import packages
from thresher.cli.inputs import language_of
from thresher.models.sources import load_source
from thresher.runtime import Engine, export
from thresher.runtime.generate import generate
from thresher.runtime.perplexity import Windows, logits, surprise

pytestmark = pytest.mark.slow
CHAT = (  # as the model's template writes it
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France? Answer in one sentence.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    with packages("transformers", "tokenizers"):
        from tests.benchmarks import zoo

        folder: Path = zoo.smollm2_folder()
    return export(load_source(f"hf:{folder}"), tmp_path_factory.mktemp("smollm2") / "e.engine")


def test_perplexity_of_editorials(engine: Engine) -> None:
    """41.88 on the first 16 windows of 1024 tokens, with transformers in float32."""
    with packages():
        text = editorials()
    steps = language_of(engine.preprocessing, engine.name)
    windows = Windows.cut("editorials", steps.read(text), 1024, steps.positions, limit=16)
    losses = [surprise(logits(engine, ids), ids) for ids in windows.ids]
    assert np.exp(np.mean(losses)) == pytest.approx(41.88, abs=0.005)


def test_a_question_is_answered(engine: Engine) -> None:
    steps = language_of(engine.preprocessing, engine.name)
    write, pieces = steps.writer(), list[str]()
    generate(
        engine,
        steps.read(CHAT),
        tokens=32,
        ends=steps.ends,
        positions=steps.positions,
        tell=lambda token: pieces.append(write(token)),
    )
    assert "".join(pieces) == "The capital of France is Paris."
