"""The loop round a language model: positions, padding, where it stops, and what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, islice

import numpy as np
import pytest

from thresher.compiler.errors import UsageError
from thresher.runtime.feeds import Array, checked
from thresher.runtime.generate import Session, generate, greedy
from thresher.runtime.manifest import Ranges, TensorInfo
from thresher.runtime.perplexity import Windows, compare_perplexity, surprise
from thresher.runtime.profiling import batch_inputs

VOCABULARY = 50


class Adder:
    """The next token is the sum of all real ones so far; its "keys" are the tokens themselves.

    Everything it needs comes through the cache and the mask, so either of them wrong is a wrong sum.
    """

    name, precision, reduced, changed_by = "adder", "fp32", False, ()
    inputs = (
        TensorInfo(name="input_ids", dtype="int64", shape=("batch", "sequence")),
        TensorInfo(name="attention_mask", dtype="int64", shape=("batch", "past + sequence")),
        TensorInfo(name="position_ids", dtype="int64", shape=("batch", "sequence")),
        TensorInfo(name="past_key_values.0.key", dtype="float32", shape=("batch", 1, "past", 1)),
    )
    outputs = (
        TensorInfo(name="logits", dtype="float32", shape=("batch", "sequence", VOCABULARY)),
        TensorInfo(name="present.0.key", dtype="float32", shape=("batch", 1, "past + sequence", 1)),
    )

    def __init__(self, sharpness: float = 1.0) -> None:
        self.sharpness = sharpness
        self.ranges: Ranges = {"past": (0, None)}
        self.positions: list[list[list[int]]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = checked(inputs, self.inputs, self.ranges)
        self.positions.append(feeds["position_ids"].tolist())
        new = feeds["input_ids"][:, None, :, None].astype(np.float32)
        keys = np.concatenate([feeds["past_key_values.0.key"], new], axis=2)
        sums = (keys[:, 0, :, 0] * feeds["attention_mask"]).cumsum(axis=1)
        sums = sums[:, -feeds["input_ids"].shape[1] :].astype(np.int64) % VOCABULARY
        logits = self.sharpness * np.eye(VOCABULARY, dtype=np.float32)[sums]
        return {"logits": logits, "present.0.key": keys}


def test_a_step_is_timed_behind_tokens_and_not_behind_noise() -> None:
    """The model itself made the past, from tokens that differ; the same for each who asks."""
    sizes = {"past": 40, "sequence": 1}
    feeds = batch_inputs(Adder(), 2, sizes)
    past, other = (f["past_key_values.0.key"] for f in (feeds, batch_inputs(Adder(), 2, sizes)))
    assert past.shape == (2, 1, 40, 1)
    assert np.array_equal(past, other)
    assert np.array_equal(past, past.astype(np.int64))
    assert len(np.unique(past)) > 20
    assert feeds["position_ids"].tolist() == [[40], [40]]


def test_the_cache_and_the_mask_are_carried_on() -> None:
    ids, real = np.array([[9, 9, 3, 4], [1, 2, 3, 4]]), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    model = Adder()
    found = np.stack(list(islice(greedy(model, ids, real), 3)), axis=1)
    assert found.tolist() == [[7, 14, 28], [10, 20, 40]]
    assert model.positions == [[[0, 0, 0, 1], [0, 1, 2, 3]], [[2], [4]], [[3], [5]]]


@pytest.mark.parametrize(
    ("options", "tokens", "stopped"),
    [
        ({"tokens": 3}, (3, 6, 12), "tokens"),
        ({"tokens": 9, "ends": (24, 12)}, (3, 6, 12), "end"),
        ({"tokens": 9, "positions": 4}, (3, 6, 12), "positions"),
        ({"tokens": 9, "positions": 2}, (3,), "positions"),
        ({"tokens": 1, "ends": (3,)}, (3,), "end"),
    ],
)
def test_where_it_stops(
    options: dict[str, int | tuple[int, ...]], tokens: tuple[int, ...], stopped: str
) -> None:
    told: list[int] = []
    model, clock = Adder(), count()
    made = generate(model, [1, 2], tell=told.append, clock=lambda: next(clock), **options)  # type: ignore[arg-type]
    assert (made.tokens, made.stopped) == (tokens, stopped)
    assert told == [t for t in tokens if t not in options.get("ends", ())]  # type: ignore[operator]
    assert max(p for step in model.positions for row in step for p in row) < 4
    assert made.prefill_rate == 2.0
    assert made.decode_rate == (len(tokens) - 1 if len(tokens) > 1 else None)


def test_prompts_that_cannot_be_continued() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        generate(Adder(), [], tokens=1)
    with pytest.raises(UsageError, match="3 tokens and the model knows 2 positions"):
        generate(Adder(), [1, 2, 3], tokens=1, positions=2)


def test_a_model_without_a_cache_is_told() -> None:
    class Classifier(Adder):
        inputs = Adder.inputs[:1]  # type: ignore[assignment]

    with pytest.raises(UsageError, match="no causal language model, it takes input_ids"):
        Session(Classifier(), 1)


def test_surprise_is_the_negative_log_likelihood() -> None:
    rng = np.random.default_rng(0)
    logits = 20 * rng.standard_normal((300, 7)).astype(np.float32)
    ids = rng.integers(0, 7, 300)
    wanted = []
    for row, token in zip(logits[:-1].astype(np.longdouble), ids[1:], strict=True):
        wanted.append(float(np.log(sum(np.exp(row - row[token])))))
    np.testing.assert_allclose(surprise(logits, ids), wanted, rtol=1e-12, atol=1e-12)


def test_perplexity_is_compared_in_pairs() -> None:
    """A model that is sure of nothing has a perplexity of its vocabulary, whatever the text."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 83).tolist()
    windows = Windows.cut("text", tokens, length=20)
    assert windows.ids.shape == (4, 20)
    found = compare_perplexity(Adder(0.0), Adder(2.0), windows, max_drop=1.0)
    assert found.perplexity_a == pytest.approx(VOCABULARY)
    total = 0.0
    for window in np.array(tokens[:80]).reshape(4, 20):
        for place in range(1, 20):
            right = window[:place].sum() % VOCABULARY == window[place]
            total += np.log(VOCABULARY - 1 + np.exp(2.0)) - 2.0 * right
    assert found.perplexity_b == pytest.approx(np.exp(total / 76))
    assert found.rise == pytest.approx(100 * (found.perplexity_b / VOCABULARY - 1))
    assert found.kept is (found.rise <= 1.0)
    assert found.standard_error > 0
    same = compare_perplexity(Adder(2.0), Adder(2.0), windows, max_drop=0.0)
    assert (same.rise, same.standard_error, same.agreement, same.kept) == (0.0, 0.0, 1.0, True)


def test_windows() -> None:
    tokens = list(range(30))
    assert Windows.cut("t", tokens).ids.shape == (1, 30)
    assert Windows.cut("t", tokens, positions=8).ids.shape == (3, 8)
    assert Windows.cut("t", tokens, 8, limit=2).ids.tolist() == [tokens[:8], tokens[8:16]]
    for bad, message in (
        ({"length": 40}, "30 tokens and a window 40"),
        ({"length": 1}, "a window of 1"),
        ({"length": 9, "positions": 8}, "2 to 8 tokens"),
        ({"tokens": [4]}, "1 tokens and a window"),
    ):
        with pytest.raises(UsageError, match=message):
            Windows.cut("t", **{"tokens": tokens, **bad})  # type: ignore[arg-type]
