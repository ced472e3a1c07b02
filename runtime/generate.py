"""Text from a causal language model, one likeliest token after the other; without torch.

The host keeps what the graph gives as ``present.*`` and feeds it back as ``past_key_values.*``: the
graph reads a prompt with an empty past, and makes each step from one token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thresher.compiler.errors import UsageError
from thresher.compiler.handed import CORE
from thresher.runtime.feeds import Array
from thresher.runtime.manifest import TensorInfo
from thresher.runtime.runner import Runnable
from thresher.runtime.sample import VOCABULARY, batch_symbol

PAST, PRESENT = "past_key_values.", "present."


def is_language_model(inputs: Sequence[TensorInfo]) -> bool:
    """Whether a model takes the keys and values of earlier tokens."""
    return any(map(_is_past, inputs))


def _is_past(spec: TensorInfo) -> bool:
    return spec.name.startswith(PAST)


def _present(past: str) -> str:
    """The output that becomes an input of the next call."""
    return PRESENT + past.removeprefix(PAST)


class Session:
    """A batch of texts in progress: which of the tokens so far are real, and their keys and values.

    ``past`` holds these under the names of the inputs that they are for.  ``held`` are inputs that stay
    the same in all calls.

    Raises:
        UsageError: the model is no causal language model, or lacks some of its outputs.
    """

    def __init__(
        self, model: Runnable, batch: int, held: Mapping[str, Array] | None = None
    ) -> None:
        if not is_language_model(model.inputs):
            takes = ", ".join(spec.name for spec in model.inputs)
            raise UsageError(
                f"{model.name} is no causal language model, it takes {takes}: give one that was made"
                " from hf:FOLDER of such a model"
            )
        wanted = {"logits", *(_present(spec.name) for spec in model.inputs if _is_past(spec))}
        if missing := sorted(wanted - {spec.name for spec in model.outputs}):
            raise UsageError(f"{model.name} lacks the output {missing[0]}: keep all outputs")
        self._model, self._held = model, held or {}
        self._real = np.zeros((batch, 0), np.int64)
        self.past = empty_past(model.inputs, batch)

    def feed(self, ids: Array, real: Array) -> Array:
        """Logits ``[B, N, vocabulary]`` behind new tokens ``[B, N]``; ``real`` is 0 at padding.

        Padding has no position, wherever it stands: positions count real tokens.
        """
        self._real = np.concatenate([self._real, real], axis=1)
        positions = np.maximum(self._real.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        told = {"input_ids": ids, "attention_mask": self._real, "position_ids": positions}
        outputs = self._model.run({**told, **self.past, **self._held})
        self.past = {name: outputs[_present(name)] for name in self.past}
        return outputs["logits"]


def empty_past(inputs: Sequence[TensorInfo], batch: int) -> dict[str, Array]:
    """Keys and values of no tokens, for a batch of so many texts."""
    sizes = {batch_symbol(inputs): batch, "past": 0}
    return {
        spec.name: np.zeros([a if isinstance(a, int) else sizes[a] for a in spec.shape], spec.dtype)
        for spec in inputs
        if _is_past(spec)
    }


def with_own_past(model: Runnable, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs whose past is one that the model itself made, if it takes a past at all.

    Keys and values at random are nothing that a trained model ever meets: it answers with activations
    a hundred times as sensitive to rounding, and of other sizes, as behind one token again and again: a
    model that skips small inputs skips more there than in a text.
    """
    names = [name for name in feeds if name.startswith(PAST)]
    if not names:
        return dict(feeds)
    ids, tokens = feeds["input_ids"], feeds[names[0]].shape[2]
    held = {name: value for name, value in feeds.items() if name.startswith(CORE)}
    session = Session(model, len(ids), held)
    if tokens:
        before = np.random.default_rng(0).integers(0, VOCABULARY, (len(ids), tokens))
        session.feed(before, np.ones_like(before))
    positions = np.broadcast_to(tokens + np.arange(ids.shape[1]), ids.shape)
    return {**feeds, "position_ids": positions, **session.past}


def greedy(model: Runnable, ids: Array, real: Array) -> Iterator[Array]:
    """The likeliest next token of every text, int64 ``[B]``, again and again without end.

    Args:
        model: a causal language model.
        ids: prompts ``[B, N]``, int64, padded on the left.
        real: 1 where a token is real, 0 at padding.
    """
    session = Session(model, len(ids))
    logits = session.feed(ids, real)
    while True:
        chosen = logits[:, -1].argmax(-1)
        yield chosen
        logits = session.feed(chosen[:, None], np.ones((len(ids), 1), np.int64))


@dataclass(frozen=True)
class Generation:
    """What followed a prompt; seconds of reading it and of the steps behind the first token.

    ``stopped``: by an ``"end"`` token, which is the last of ``tokens``; by the number of ``"tokens"``
    asked for; or because the model knows no more ``"positions"``.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    stopped: str
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt read in a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens made in a second; the first one comes from reading the prompt."""
        made = len(self.tokens) - 1
        return made / self.decode_seconds if made else None


def generate(
    model: Runnable,
    prompt: Sequence[int],
    *,
    tokens: int,
    ends: Sequence[int] = (),
    positions: int | None = None,
    tell: Callable[[int], None] = lambda token: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generation:
    """Continue a prompt greedily.

    Args:
        model: a causal language model.
        prompt: token ids.
        tokens: how many tokens to make at most.
        ends: token ids that end the text.
        positions: number of positions that the model knows.
        tell: called with each token, but not with one that ends the text.
        clock: seconds; for tests.

    Raises:
        UsageError: no causal language model, an empty prompt, or one that fills all positions.
    """
    if not prompt:
        raise UsageError("the prompt has no tokens: give some text")
    room = tokens
    if positions is not None:
        room = min(tokens, positions - len(prompt) + 1)  # the last token made needs no position
        if len(prompt) > positions:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the model knows {positions} positions:"
                " shorten it"
            )
    ids = np.asarray([prompt], np.int64)
    start = clock()
    following = greedy(model, ids, np.ones_like(ids))
    made = [int(next(following)[0])]
    read = clock()
    while made[-1] not in ends:
        tell(made[-1])
        if len(made) == room:
            break
        made.append(int(next(following)[0]))
    spent = clock() - read
    stopped = "end" if made[-1] in ends else "tokens" if len(made) == tokens else "positions"
    return Generation(len(prompt), tuple(made), stopped, read - start, spent)
