"""``thresher run --prompt``: a causal language model writes on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from thresher.cli.console import progress, say, show_json

if TYPE_CHECKING:
    from thresher.runtime.generate import Generation

STOPPED = {
    "end": "the text ended",
    "tokens": "as many as were asked for",
    "positions": "the model knows no more positions",
}


def continue_text(
    engine: str, prompt: str, tokens: int, threads: int | None, steps: str | None, *, json: bool
) -> None:
    """Print what follows the prompt as it is made, then how fast it was made.

    Args:
        steps: an engine that makes the steps behind the prompt, by default the same.

    Raises:
        UsageError: the engines do not go together, the first is no causal language model or has no
            tokenizer, or the prompt is empty or too long.
    """
    from thresher.cli.inputs import language_of
    from thresher.runtime import Engine
    from thresher.runtime.generate import generate
    from thresher.runtime.two_graphs import TwoGraphs

    with progress() as tell:
        tell(f"loading {engine}", 0, 0)
        first = Engine.load(engine, threads=threads)
        following = None if steps is None else Engine.load(steps, threads=threads)
    with first, following or nullcontext():
        model = first if following is None else TwoGraphs(first, following)
        language = language_of(first.preprocessing, first.name)
        write, pieces = language.writer(), list[str]()

        def add(token: int) -> None:
            pieces.append(write(token))
            if not json:
                print(pieces[-1], end="", flush=True)

        found = generate(
            model,
            language.read(prompt),
            tokens=tokens,
            ends=language.ends,
            positions=language.positions,
            tell=add,
        )
    if json:
        rates = {"prefill_rate": found.prefill_rate, "decode_rate": found.decode_rate}
        told = {"engine": engine, "prompt": prompt, "text": "".join(pieces)}
        show_json("generate", {**told, **asdict(found), **rates})
    else:
        print()
        say(summary(found))


def summary(found: Generation) -> str:
    """One line: how much, why it stopped, and how fast."""
    rate = found.decode_rate
    made = f"{len(found.tokens)} tokens made ({STOPPED[found.stopped]})"
    return f"{found.prompt_tokens} tokens read at {found.prefill_rate:.1f} a second; {made}" + (
        f" at {rate:.1f} a second" if rate else ""
    )
