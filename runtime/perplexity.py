"""How well a causal language model foretells a text: perplexity, compared in pairs.

A text is cut into windows of as many tokens, each read on its own from an empty past; within a
window every token but the first is foretold.  Perplexity is ``exp`` of the mean negative
log-likelihood of all of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import UsageError
from thresher.runtime.feeds import Array
from thresher.runtime.generate import Session, empty_past
from thresher.runtime.manifest import TensorInfo
from thresher.runtime.paired import Metric, difference
from thresher.runtime.runner import Runnable

LENGTH = 1024  # tokens of a window, where the model knows as many positions
ROWS = 128  # of logits turned to float64 at a time


@dataclass(frozen=True)
class Windows:
    """A text as tokens.  ``ids`` is int64 ``[windows, tokens]``.

    ``step`` tokens are read at once, by default a whole window: with 1 the model works as it does
    when it writes.  The first ``prompt`` tokens are read at once before that and not judged.
    """

    name: str
    ids: Array
    step: int | None = None
    prompt: int = 0

    @staticmethod
    def cut(
        name: str,
        tokens: Sequence[int],
        length: int | None = None,
        positions: int | None = None,
        limit: int | None = None,
    ) -> Windows:
        """The first ``limit`` windows of a text; what is left behind the last whole one is not used.

        Args:
            name: where the text is from.
            tokens: the whole text.
            length: tokens of a window; by default 1024, or as many as there are.
            positions: number of positions that the model knows.

        Raises:
            UsageError: the text is too short, or a window is too short or longer than the model knows.
        """
        known = min(LENGTH, positions or LENGTH, len(tokens))
        if length is not None and not 2 <= length <= (positions or length):
            raise UsageError(
                f"a window of {length} tokens cannot be judged: give --size sequence=N with"
                f" 2 to {positions or 'any number of'} tokens"
            )
        size = length or known
        count = len(tokens) // max(size, 2)
        if not count:
            raise UsageError(f"{name} has {len(tokens)} tokens and a window {size}: give more text")
        count = min(count, limit or count)
        return Windows(name, np.asarray(tokens[: count * size], np.int64).reshape(count, size))

    def feeds(self, chosen: Sequence[int], inputs: Sequence[TensorInfo]) -> dict[str, Array]:
        """These windows as all inputs of a language model, behind an empty past."""
        ids = self.ids[list(chosen)]
        told = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
        }
        return {**told, **empty_past(inputs, len(ids))}


@dataclass(frozen=True)
class PerplexityKept:
    """Second verdict of a language model, on a text.

    ``rise`` is ``100 (b / a - 1)`` in percent; ``standard_error`` is its paired standard error over
    windows, carried from log-likelihoods to percent by the slope of ``exp``.  ``agreement`` is the
    share of tokens for which both deem the same next token likeliest.  ``kept`` is None when no
    bound was demanded.
    """

    dataset: str
    windows: int
    length: int
    perplexity_a: float
    perplexity_b: float
    rise: float
    standard_error: float
    agreement: float
    max_drop: float | None
    kept: bool | None
    step: int | None = None
    prompt: int = 0

    def sentence(self, a: str, b: str) -> str:
        """The verdict in words."""
        answer = "not demanded"
        if self.kept is not None and self.max_drop is not None:
            near = abs(self.rise - self.max_drop) < 2 * self.standard_error
            doubt = ", though within two standard errors of the limit" if near else ""
            answer = f"{'yes' if self.kept else 'no'}, it may rise by {self.max_drop:g}%{doubt}"
        pace = "" if self.step is None else f", read {self.step} at a time"
        if self.prompt:
            pace += f", judged behind a prompt of {self.prompt}"
        return (
            f"quality kept: {answer}; perplexity is {self.perplexity_b:.2f} with {b} and"
            f" {self.perplexity_a:.2f} with {a} on {self.windows} windows of {self.length} tokens{pace}:"
            f" {self.rise:+.2f}% (standard error {self.standard_error:.2f}),"
            f" {self.agreement:.2%} of the likeliest next tokens are the same"
        )


def compare_perplexity(
    a: Runnable,
    b: Runnable,
    windows: Windows,
    *,
    max_drop: float | None = None,
) -> PerplexityKept:
    """Perplexity of ``b`` beside that of the reference ``a`` on the same windows.

    Args:
        a: the reference.
        b: the candidate.
        windows: the text.
        max_drop: percent that perplexity may rise.

    Raises:
        UsageError: one of the two is no causal language model.
    """
    losses: list[tuple[float, float]] = []
    equal = foretold = 0
    for ids in windows.ids:
        start = max(windows.prompt - 1, 0)  # the token that the first judged one is foretold from
        left, right = (logits(model, ids, windows.step, windows.prompt)[start:] for model in (a, b))
        judged = ids[start:]
        losses.append((float(surprise(left, judged).mean()), float(surprise(right, judged).mean())))
        equal += int((left[:-1].argmax(-1) == right[:-1].argmax(-1)).sum())
        foretold += len(judged) - 1
    first, second = (Metric("loss", np.array(column)) for column in zip(*losses, strict=True))
    found = difference(second, first)
    ratio = float(np.exp(found.value))
    rise = 100 * (ratio - 1)
    return PerplexityKept(
        dataset=windows.name,
        windows=len(windows.ids),
        length=windows.ids.shape[1],
        perplexity_a=float(np.exp(first.value)),
        perplexity_b=float(np.exp(second.value)),
        rise=rise,
        standard_error=100 * ratio * found.error,
        agreement=equal / foretold,
        max_drop=max_drop,
        kept=None if max_drop is None else rise <= max_drop,
        step=windows.step,
        prompt=windows.prompt,
    )


def logits(model: Runnable, ids: Array, step: int | None = None, prompt: int = 0) -> Array:
    """``[N, vocabulary]`` of one window ``[N]`` read from an empty past, ``step`` tokens at once.

    The first ``prompt`` tokens are read at once before that.
    """
    session, size = Session(model, 1), step or len(ids)
    cuts = [*([0] if prompt else []), *range(prompt, len(ids), size), len(ids)]
    parts = [ids[None, start:end] for start, end in pairwise(cuts)]
    return np.concatenate([session.feed(part, np.ones_like(part))[0] for part in parts])


def surprise(logits: Array, ids: Array) -> NDArray[np.float64]:
    """Negative log-likelihood ``[N - 1]`` of every token but the first, in nats."""
    found = np.empty(len(ids) - 1)
    for start in range(0, len(found), ROWS):
        rows = logits[start : min(start + ROWS, len(found))].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        right = rows[np.arange(len(rows)), ids[start + 1 : start + 1 + len(rows)]]
        found[start : start + len(rows)] = np.log(np.exp(rows).sum(axis=1)) - right
    return found
