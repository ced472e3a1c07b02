"""The picture of ``inspect --image``: which patches survive each block, and which are one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import RefusedError
from thresher.compiler.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Image = NDArray[np.float64]  # [H, W, 3], values 0 to 1
Grid = NDArray[np.int64]  # [rows, columns] of patches: the token that each patch is part of, or -1

COLUMNS = 4
INCHES = 2.4  # side of a panel
LARGEST_SIDE = 448  # pixels that a panel shows; smaller images are enlarged to whole multiples
FADED = 0.22  # how much of a dropped patch's picture is left
PAPER = np.array([0.93, 0.93, 0.93])
DARK, LIGHT = "#101010", "#9a9a9a"  # of lines, on bright and on dark images


@dataclass(frozen=True)
class Stage:
    """The patches after one block that changes them."""

    title: str
    owner: Grid


def grid_shape(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches over an image of ``height x width`` pixels.

    Raises:
        RefusedError: the tokens are no grid of square patches.
    """
    rows = round(sqrt(patches * height / width))
    columns = patches // rows if rows else 0
    if rows * columns != patches or not rows:
        raise RefusedError(
            f"{patches} tokens do not tile an image of {height}x{width} pixels,"
            " so there is no picture to draw: leave --image out"
        )
    return rows, columns


def stages(
    titles: Sequence[str],
    positions: Sequence[NDArray[np.int64]],
    protected: int,
    size: tuple[int, int],
) -> list[Stage]:
    """Grids from the position ``[N]`` of every original token after each site."""
    return [
        Stage(title, where[protected:].reshape(size))
        for title, where in zip(titles, positions, strict=True)
    ]


def paint(image: Image, owner: Grid) -> Image:
    """The image with merged patches in their mean colour and dropped ones faded."""
    label = enlarge(owner, image.shape[:2])
    painted = image.copy()
    dropped = label < 0
    painted[dropped] = FADED * image[dropped] + (1 - FADED) * PAPER
    flat, pixels = label.ravel(), image.reshape(-1, 3)
    tokens = int(flat.max(initial=-1)) + 1
    counts = np.bincount(flat[flat >= 0], minlength=tokens)
    patches = np.bincount(owner[owner >= 0], minlength=tokens)
    sums = [np.bincount(flat[flat >= 0], pixels[flat >= 0, c], tokens) for c in range(3)]
    mean = np.stack(sums, axis=-1) / np.maximum(counts, 1)[:, None]
    merged = ~dropped & (patches > 1)[np.maximum(label, 0)] if tokens else dropped & False
    painted[merged] = mean[label[merged]]
    return painted


def enlarge(owner: Grid, size: tuple[int, ...]) -> Grid:
    """The owner of every pixel."""
    rows = np.arange(size[0]) * owner.shape[0] // size[0]
    columns = np.arange(size[1]) * owner.shape[1] // size[1]
    return owner[rows[:, None], columns[None, :]]


def borders(owner: Grid) -> list[list[tuple[float, float]]]:
    """Line segments between patches of different tokens, in patch units ``(x, y)``."""
    rows, columns = owner.shape
    upright = [
        [(x + 1.0, float(y)), (x + 1.0, y + 1.0)]
        for y in range(rows)
        for x in range(columns - 1)
        if owner[y, x] != owner[y, x + 1]
    ]
    level = [
        [(float(x), y + 1.0), (x + 1.0, y + 1.0)]
        for y in range(rows - 1)
        for x in range(columns)
        if owner[y, x] != owner[y + 1, x]
    ]
    return upright + level


def draw(path: Path, image: Image, found: Sequence[Stage], headline: str) -> None:
    """Write one PNG: the image, then a panel for every stage.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _at_least(image, LARGEST_SIDE)
    columns = min(COLUMNS, len(found) + 1)
    rows = ceil((len(found) + 1) / columns)
    tall = INCHES * image.shape[0] / image.shape[1] + 0.3
    figure = Figure(figsize=(columns * INCHES + 0.2, rows * tall + 0.9), dpi=160)
    FigureCanvasAgg(figure)
    figure.suptitle(headline, fontsize=10, x=0.02, ha="left")
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for panel in panels:
        panel.set_axis_off()
    _panel(
        panels[0], shown, "the image as the model sees it", found[0].owner.shape if found else None
    )
    for panel, stage in zip(panels[1:], found, strict=False):
        _panel(panel, paint(shown, stage.owner), stage.title, stage.owner.shape)
        _lines(panel, stage.owner, DARK if image.mean() > 0.35 else LIGHT)
    figure.text(0.02, 0.012, _legend(found), fontsize=7.5, ha="left", color="#404040")
    figure.tight_layout(rect=(0, 0.03, 1, 0.99), h_pad=0.6, w_pad=0.4)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", facecolor="white")


def _panel(panel: Axes, image: Image, title: str, size: Any) -> None:
    rows, columns = size or image.shape[:2]
    panel.imshow(image, extent=(0, columns, rows, 0), interpolation="nearest", aspect="auto")
    panel.set_box_aspect(image.shape[0] / image.shape[1])
    panel.set_title(title, fontsize=8, pad=3)


def _lines(panel: Axes, owner: Grid, colour: str) -> None:
    from matplotlib.collections import LineCollection

    panel.add_collection(LineCollection(borders(owner), colors=colour, linewidths=0.35))


def _legend(found: Sequence[Stage]) -> str:
    said = []
    if any((stage.owner < 0).any() for stage in found):
        said.append("pale: the patch's token was dropped")
    if any(_shared(stage.owner) for stage in found):
        said.append("one flat colour: patches merged into one token, at their mean colour")
    return "   ".join([*said, "lines: borders between tokens"] if said else ["no token left"])


def _shared(owner: Grid) -> bool:
    alive = owner[owner >= 0]
    return len(np.unique(alive)) < alive.size


def _at_least(image: Image, side: int) -> Image:
    factor = max(1, side // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
