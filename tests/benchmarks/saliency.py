"""Token reduction on a DINOv2-S saliency model: global feature, dense map, and speed at 518 px.

python -m tests.benchmarks.saliency [--parts probe map speed] [--map-size 224] [--limit 100] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.benchmarks import zoo
from tests.benchmarks.common import Study, parser, say, study
from tests.benchmarks.data import Scene, cut_outs, fashion_mnist
from tests.benchmarks.report import finish
from thresher.models.data import Dataset
from thresher.runtime.paired import Metric
from thresher.runtime.runner import Runnable

TRAIN, TEST, SCENES = 3000, 1000, 200
PROBE_SIZE, MAP_SIZE = 112, 224
NEAR = 7.0 / MAP_SIZE  # of the map's side, that its maximum may lie beside the object
LONGEST = 90 / MAP_SIZE  # of the side, an object at most
BATCH_PIXELS = 20 * MAP_SIZE**2
PARTS = ("probe", "map", "speed")


def chosen(split: str, count: int, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """The first ``count`` of a permutation of Fashion-MNIST."""
    images, labels = fashion_mnist(split)
    order = rng.permutation(len(images))[:count]
    return images[order], labels[order]


def probe_pixels(images: NDArray[Any]) -> NDArray[np.float32]:
    """What the model takes, of grey images uint8 ``[N, 28, 28]``."""
    grey = torch.from_numpy(images.copy()).float()[:, None] / 255
    return zoo.pixels(grey, PROBE_SIZE).numpy()


def map_pixels(scenes: Sequence[Scene]) -> NDArray[np.float32]:
    """What the model takes, of scenes of one size."""
    images = np.stack([scene.image for scene in scenes])
    return zoo.pixels(torch.from_numpy(images), images.shape[-1]).numpy()


def unlabelled(name: str, pixels: NDArray[np.float32]) -> Dataset:
    """Data for methods that learn or count."""
    return Dataset(name, len(pixels), None, lambda items: {"pixel_values": pixels[list(items)]})


def features(runnable: Runnable, images: NDArray[Any], batch: int = 50) -> NDArray[np.float32]:
    """Global features ``[N, 384]`` of grey images uint8 ``[N, 28, 28]``."""
    found = []
    for start in range(0, len(images), batch):
        values = probe_pixels(images[start : start + batch])
        found.append(runnable.run({"pixel_values": values})["feature"])
        if start % 500 == 0 and len(images) > TEST:
            say(f"  features of {start:,} of {len(images):,} training images")
    return np.concatenate(found)


class Probe:
    """Fashion-MNIST accuracy of a linear probe that is fitted to the dense model and then kept."""

    def __init__(self, train: int, test: int) -> None:
        rng = np.random.default_rng(0)
        self.train = chosen("train", train, rng)
        self.test = chosen("test", test, rng)
        self.classifier: Any = None

    def __call__(self, runnable: Runnable) -> list[Metric]:
        """Accuracy; the first runnable, which is the dense one, is what the probe is fitted to."""
        if self.classifier is None:
            self.fit(runnable)
        images, labels = self.test
        guesses = self.classifier.predict(features(runnable, images))
        return [Metric("accuracy", guesses == labels)]

    def fit(self, runnable: Runnable) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        images, labels = self.train
        self.classifier = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)
        ).fit(features(runnable, images), labels)


def overlap(found: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """IoU of the mask with as many of the highest pixels as the mask has."""
    area = int(mask.sum())
    top = np.zeros(mask.size, bool)
    top[np.argpartition(-found.ravel(), area - 1)[:area]] = True
    both = np.count_nonzero(top & mask.ravel())
    return both / (2 * area - both)


def points(found: NDArray[np.float32], mask: NDArray[np.bool_]) -> bool:
    """Whether the highest pixel lies on the object or within 3 % of the map's side of it."""
    row, column = np.unravel_index(found.argmax(), found.shape)
    rows, columns = np.nonzero(mask)
    return bool(np.hypot(rows - row, columns - column).min() <= NEAR * found.shape[0])


def localisation(runnable: Runnable, scenes: Sequence[Scene]) -> list[Metric]:
    """IoU and pointing game of the dense map."""
    pairs = list(zip(_maps(runnable, scenes), (scene.mask for scene in scenes), strict=True))
    hits = np.array([points(found, mask) for found, mask in pairs])
    return [
        Metric("IoU", np.array([overlap(found, mask) for found, mask in pairs])),
        Metric("pointing", hits),
    ]


def _maps(runnable: Runnable, scenes: Sequence[Scene]) -> Iterator[NDArray[np.float32]]:
    size = scenes[0].image.shape[-1]
    batch = max(1, BATCH_PIXELS // size**2)
    for start in range(0, len(scenes), batch):
        values = map_pixels(scenes[start : start + batch])
        yield from runnable.run({"pixel_values": values})["map"]


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, limit=TEST)
    options.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    options.add_argument("--map-size", type=int, default=MAP_SIZE, help="pixels, of the map")
    options.add_argument(
        "--learn", type=int, default=0, help="other pictures that methods learn or count on"
    )
    args = options.parse_args(argv)
    studies: list[Study] = []
    if "probe" in args.parts:
        train = TRAIN if args.limit == TEST else min(TRAIN, 3 * args.limit)
        title = f"DINOv2-S saliency model, {PROBE_SIZE} px, Fashion-MNIST probe"
        probe = Probe(train, args.limit)
        learned = probe.train[0][: args.learn]
        seen = unlabelled("training images", probe_pixels(learned)) if args.learn else None
        studies.append(
            study(
                f"{title}, {train:,} / {args.limit:,} images",
                zoo.saliency(PROBE_SIZE, head=False),
                probe,
                args,
                data=seen,
                batch=8,
                notes=["the probe of the dense model is kept, not fitted again"],
            )
        )
    if "map" in args.parts:
        side = args.map_size
        count = min(SCENES, args.limit)
        pasted = cut_outs(count + args.learn, side, longest=round(LONGEST * side))
        scenes, others = pasted[:count], pasted[count:]
        seen = unlabelled("other cut-outs", map_pixels(others)) if others else None
        studies.append(
            study(
                f"DINOv2-S saliency model, {side} px, dense map, {len(scenes)} cut-outs",
                zoo.saliency(side),
                lambda runnable: localisation(runnable, scenes),
                args,
                data=seen,
                batch=1,
                notes=["the convolutional head, which no method touches, is in MACs and times"],
            )
        )
    if "speed" in args.parts:
        studies.append(
            study(
                f"DINOv2-S backbone, {zoo.NATIVE} px, 1,370 tokens: speed only",
                zoo.saliency(zoo.NATIVE, head=False),
                None,
                args,
                batch=1,
            )
        )
    finish(studies, args)


if __name__ == "__main__":
    main()
