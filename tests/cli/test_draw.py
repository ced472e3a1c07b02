"""The picture of token maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thresher.cli.draw import Stage, borders, draw, enlarge, grid_shape, paint, stages
from thresher.compiler.errors import RefusedError, UsageError

OWNER = np.array([[0, 1], [-1, 1]])


def checkers() -> np.ndarray:
    """A 4x4 picture; each quarter has a brightness of its own, left column darkest."""
    quarters = np.array([[0.0, 0.2], [0.6, 1.0]])
    return np.repeat(np.repeat(quarters, 2, 0), 2, 1)[..., None].repeat(3, 2)


@pytest.mark.parametrize(
    ("patches", "height", "width", "shape"),
    [
        (196, 224, 224, (14, 14)),
        (196, 28, 28, (14, 14)),
        (8, 2, 4, (2, 4)),
        (2048, 512, 1024, (32, 64)),
    ],
)
def test_grid_follows_the_shape_of_the_image(
    patches: int, height: int, width: int, shape: tuple[int, int]
) -> None:
    assert grid_shape(patches, height, width) == shape


def test_tokens_that_are_no_grid_are_refused() -> None:
    with pytest.raises(RefusedError, match="197 tokens do not tile"):
        grid_shape(197, 224, 224)


def test_prefix_tokens_are_left_out_of_the_grid() -> None:
    (stage,) = stages(["block 0"], [np.array([0, 1, 2, -1, 2])], 1, (2, 2))
    assert stage.owner.tolist() == [[1, 2], [-1, 2]]


def test_merged_patches_take_their_mean_colour_and_dropped_ones_a_tint() -> None:
    image = checkers()
    painted = paint(image, OWNER)
    np.testing.assert_array_equal(painted[:2, :2], image[:2, :2])
    np.testing.assert_allclose(painted[:, 2:], 0.6)
    assert (np.ptp(painted[2:, :2], axis=2) > 0.1).all()


def test_nothing_left_is_all_tinted() -> None:
    painted = paint(checkers(), np.full((2, 2), -1))
    assert (np.ptp(painted, axis=2) > 0.1).all()


def test_owner_of_every_pixel() -> None:
    assert enlarge(OWNER, (4, 4)).tolist() == [[0, 0, 1, 1]] * 2 + [[-1, -1, 1, 1]] * 2


def test_borders_stand_between_different_tokens_only() -> None:
    around, plain = borders(OWNER)
    assert set(around) == {((1, 0), (1, 1)), ((1, 1), (1, 2))}
    assert plain == [((0, 1), (1, 1))]


def test_picture_has_a_panel_for_every_stage(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 3, 11):
        path = tmp_path / f"{count}.png"
        draw(path, checkers(), [Stage(f"block {i}", OWNER) for i in range(count)], "toy")
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            sizes.append(picture.size)
    assert sizes[0][0] < sizes[1][0] == sizes[2][0]
    assert sizes[1][1] < sizes[2][1]
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".png"] == []


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        draw(tmp_path, checkers(), [Stage("block 0", OWNER)], "toy")
