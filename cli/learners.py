"""What ``inspect`` tells about adaptive networks: learners over the patches of an image or the words of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.cli.console import show, table
from thresher.compiler.errors import RefusedError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from thresher.cli.draw import Heat
    from thresher.compiler.program import Program
    from thresher.passes.adaptive.runs import Runs


def runs_of(program: Program, feeds: Mapping[str, NDArray[Any]]) -> list[Runs]:
    """Learners of one input, none where the model has no adaptive networks."""
    import torch

    from thresher.passes.adaptive.runs import learners_run

    return learners_run(program, {name: torch.from_numpy(array) for name, array in feeds.items()})


def mean_share(found: Sequence[Runs]) -> NDArray[np.float64]:
    """``[N]``: share of all learners that each token of the first item runs, none where it was dropped."""
    run = sum(runs.k[0].clip(0) for runs in found)
    share: NDArray[np.float64] = run / sum(runs.most for runs in found)
    return share


def heats(found: Sequence[Runs], protected: int, height: int, width: int) -> list[Heat]:
    """A panel for all networks together and one for each."""
    from thresher.cli.draw import Heat, grid_shape

    def grid(share: NDArray[np.float64]) -> NDArray[np.float64]:
        return share[protected:].reshape(grid_shape(len(share) - protected, height, width))

    share = mean_share(found)
    panels = [Heat(f"all networks: {share.mean():.0%} of the learners run", grid(share))]
    for runs in found:
        own = runs.k[0].clip(0) / runs.most
        panels.append(Heat(f"{runs.path}: {own.mean():.0%}", grid(own)))
    return panels


def rows(found: Sequence[Runs]) -> list[dict[str, Any]]:
    """By network: how many tokens of the first item run 0, 1, ... learners, and how many do not come by."""
    return [
        {
            "network": runs.path,
            "share": float(runs.k[0].clip(0).mean()) / runs.most,
            "tokens": [int((runs.k[0] == n).sum()) for n in range(runs.most + 1)],
            "absent": int((runs.k[0] < 0).sum()),
        }
        for runs in found
    ]


def show_rows(title: str, told: Sequence[dict[str, Any]]) -> None:
    """The same as a table."""
    most = max(len(row["tokens"]) for row in told)
    head = ("network", "run", *(f"{n} learners" for n in range(most)))
    show(table(title, head, [(r["network"], f"{r['share']:.0%}", *r["tokens"]) for r in told]))


def read_words(program: Program, text: str) -> tuple[list[dict[str, Any]], list[Runs]]:
    """The tokens of a text with the share of all learners that each runs.

    Raises:
        UsageError: the model takes no text.
        RefusedError: it has no adaptive networks.
    """
    from thresher.models.preprocess import TextSteps

    kind = (program.info.preprocessing or {}).get("kind")
    if kind != "text":
        raise UsageError(
            f"{program.info.source} takes no text with a tokenizer of its own: leave --text out"
        )
    steps = TextSteps(program.info.preprocessing or {})
    found = runs_of(program, steps([text]))
    if not found:
        raise RefusedError(
            f"{program.info.source} has no adaptive networks, so there are no learners to count by word:"
            " give a folder that 'thresher optimize --recipe acm' wrote"
        )
    tokens = steps.tokenizer.encode_batch([text])[0].tokens
    told = [
        {"token": token, "share": float(share), "learners": [int(runs.k[0, i]) for runs in found]}
        for i, (token, share) in enumerate(zip(tokens, mean_share(found), strict=True))
    ]
    return told, found


def show_words(text: str, told: Sequence[dict[str, Any]]) -> None:
    """One row for each token."""
    data = [
        (row["token"], f"{row['share']:.0%}", " ".join(map(str, row["learners"]))) for row in told
    ]
    show(table(text, ("token", "run", "learners, network by network"), data))


def draw_words(path: Path, told: Sequence[dict[str, Any]], most: int) -> None:
    """Tokens from left to right, networks from top to bottom, the lighter the more learners, as a PNG.

    Raises:
        UsageError: the file cannot be written.
    """
    import numpy as np

    from thresher.compiler.files import atomic_file
    from thresher.runtime.charts import LIGHT, figure_of, png

    counts = np.array([row["learners"] for row in told]).T
    figure, (panel,) = figure_of([1.6 + 0.22 * len(counts)], LIGHT)
    panel.imshow(counts, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    panel.set_xticks(range(len(told)), [row["token"] for row in told], rotation=60, ha="right")
    panel.tick_params(axis="x", labelsize=7)
    panel.set(ylabel="network", title=f"learners run, from 0 (dark) to {most} (light)")
    figure.set_facecolor("white")
    with atomic_file(path) as partial:
        partial.write_bytes(png(figure, transparent=False))
