"""``thresher run --prompt``: a causal language model writes on."""

from __future__ import annotations

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
    engine: str, prompt: str, tokens: int, threads: int | None, *, json: bool
) -> None:
    """Print what follows the prompt as it is made, then how fast it was made.

    Raises:
        UsageError: the engine is no causal language model or has no tokenizer, or the prompt is empty
            or too long.
    """
    from thresher.cli.inputs import language_of
    from thresher.runtime import Engine
    from thresher.runtime.generate import generate

    with progress() as tell:
        tell(f"loading {engine}", 0, 0)
        loaded = Engine.load(engine, threads=threads)
    with loaded:
        steps = language_of(loaded.preprocessing, loaded.name)
        write, pieces = steps.writer(), list[str]()

        def add(token: int) -> None:
            pieces.append(write(token))
            if not json:
                print(pieces[-1], end="", flush=True)

        found = generate(
            loaded,
            steps.read(prompt),
            tokens=tokens,
            ends=steps.ends,
            positions=steps.positions,
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
