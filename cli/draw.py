"""The picture of ``inspect --image``: which patches survive each block, which are one token, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import RefusedError
from thresher.compiler.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Each = TypeVar("Each", bound=NDArray[Any])
Segment = tuple[tuple[float, float], tuple[float, float]]  # (x, y) to (x, y) in patches
Image = NDArray[np.float64]  # [H, W, 3], values 0 to 1
Grid = NDArray[np.int64]  # [rows, columns] of patches: the token that each patch is part of, or -1

COLUMNS = 4
INCHES, GAP, TITLE = 2.4, 0.1, 0.22  # width of a panel, space beside it, height of its title
HEAD, FOOT = 0.4, 0.35  # heights of the headline and of the legend
LARGEST_SIDE = 448  # pixels that a panel shows; smaller images are enlarged to whole multiples
HEATED = 0.65  # how much of a panel of shares is their colour
FADED = 0.25  # how much of a dropped patch's picture is left
GONE = np.array([0.55, 0.60, 0.75])  # blue-grey: no picture in grey has it
AROUND, PLAIN = "#ff7f0e", "#808080"  # lines round merged patches, and between others


@dataclass(frozen=True)
class Stage:
    """The patches after one block that changes them."""

    title: str
    owner: Grid

    def painted(self, image: Image) -> Image:
        """The image as this panel shows it."""
        return paint(image, self.owner)


@dataclass(frozen=True)
class Heat:
    """How much of something each patch takes: ``share [rows, columns]`` from 0 to 1."""

    title: str
    share: NDArray[np.float64]

    @property
    def owner(self) -> Grid:
        """Every patch by itself."""
        return np.arange(self.share.size).reshape(self.share.shape)

    def painted(self, image: Image) -> Image:
        """The image in grey under the colours of the shares."""
        from matplotlib import colormaps

        colours = colormaps["viridis"](enlarge(self.share, image.shape[:2]))[..., :3]
        grey: Image = image.mean(axis=2, keepdims=True)
        mixed: Image = (1 - HEATED) * grey + HEATED * colours
        return mixed


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
    """The image with merged patches in their mean colour and dropped ones greyed out."""
    label = enlarge(owner, image.shape[:2])
    painted = image.copy()
    dropped = label < 0
    painted[dropped] = FADED * image[dropped] + (1 - FADED) * GONE
    merged = enlarge(_merged(owner), image.shape[:2])
    tokens, pixels = label[merged], image[merged]
    sums = [np.bincount(tokens, pixels[:, channel]) for channel in range(3)]
    mean = np.stack(sums, axis=-1) / np.maximum(np.bincount(tokens), 1)[:, None]
    painted[merged] = mean[tokens]
    return painted


def enlarge(grid: Each, size: tuple[int, ...]) -> Each:
    """The value of its patch for every pixel."""
    rows = np.arange(size[0]) * grid.shape[0] // size[0]
    columns = np.arange(size[1]) * grid.shape[1] // size[1]
    return cast(Each, grid[rows[:, None], columns[None, :]])


def borders(owner: Grid) -> tuple[list[Segment], list[Segment]]:
    """Lines between patches of different tokens: those round merged patches, and the others."""
    rows, columns = owner.shape
    around: list[Segment] = []
    plain: list[Segment] = []
    merged = _merged(owner)
    for y in range(rows):
        for x in range(columns):
            for dy, dx in ((0, 1), (1, 0)):
                y2, x2 = y + dy, x + dx
                if y2 == rows or x2 == columns or owner[y, x] == owner[y2, x2]:
                    continue
                lines = around if merged[y, x] or merged[y2, x2] else plain
                lines.append(((x2, y2), (x + 1, y + 1)))
    return around, plain


def _merged(owner: Grid) -> NDArray[np.bool_]:
    """Which patches share their token with others."""
    names, inverse, counts = np.unique(owner, return_inverse=True, return_counts=True)
    shared: NDArray[np.bool_] = ((counts > 1) & (names >= 0))[inverse].reshape(owner.shape)
    return shared


def draw(path: Path, image: Image, found: Sequence[Stage | Heat], headline: str) -> None:
    """Write one PNG: the image, then a panel for every stage and every map of shares.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _at_least(image, LARGEST_SIDE)
    columns = min(COLUMNS, len(found) + 1)
    rows = ceil((len(found) + 1) / columns)
    tall = INCHES * image.shape[0] / image.shape[1]
    width = columns * (INCHES + GAP) + GAP
    height = rows * (tall + TITLE + GAP) + HEAD + FOOT
    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    figure.text(GAP / width, 1 - 0.22 / height, headline, fontsize=10)
    figure.text(GAP / width, 0.13 / height, _legend(found), fontsize=7.5, color="#404040")
    first = Stage("the image as the model sees it", np.zeros((1, 1), np.int64))
    for index, stage in enumerate([first, *found]):
        row, column = divmod(index, columns)
        left = GAP + column * (INCHES + GAP)
        bottom = height - HEAD - (row + 1) * (tall + TITLE) - row * GAP
        box = (left / width, bottom / height, INCHES / width, tall / height)
        _panel(figure.add_axes(box), shown if stage is first else stage.painted(shown), stage)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", facecolor="white")


def _panel(panel: Axes, image: Image, stage: Stage | Heat) -> None:
    from matplotlib.collections import LineCollection

    rows, columns = stage.owner.shape
    around, plain = borders(stage.owner)
    panel.imshow(image, extent=(0, columns, rows, 0), interpolation="nearest", aspect="auto")
    panel.add_collection(LineCollection(plain, colors=PLAIN, linewidths=0.25, alpha=0.6))
    panel.add_collection(LineCollection(around, colors=AROUND, linewidths=0.7))
    panel.set_title(stage.title, fontsize=8, pad=3)
    panel.set_axis_off()


def _legend(panels: Sequence[Stage | Heat]) -> str:
    found = [panel for panel in panels if isinstance(panel, Stage)]
    said = ["dark to light: none to all of the learners run"] if len(found) < len(panels) else []
    if not found:
        return said[0]
    if any((stage.owner < 0).any() for stage in found):
        said.append("blue-grey: the patch's token was dropped")
    if any(_merged(stage.owner).any() for stage in found):
        said.append("one flat colour, framed: patches merged into one token, at their mean colour")
    return ";   ".join([*said, "as it was: the patch is a token of its own"])


def _at_least(image: Image, side: int) -> Image:
    factor = max(1, side // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
