"""Token reduction on the shipped ViT: accuracy on the 10,000 Fashion-MNIST test images.

python -m tests.benchmarks.fashion [--limit 500] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tests.benchmarks.common import parser, study
from tests.benchmarks.report import finish
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models import fashion
from thresher.runtime.paired import Metric
from thresher.runtime.runner import Runnable

BATCH = 100


def program() -> Program:
    """The shipped network traced at a symbolic batch."""
    return trace(
        fashion.vit(),
        {"images": torch.zeros(2, 1, 28, 28)},
        dynamic={"images": {0: "batch"}},
        info=SourceInfo("thresher.models.fashion:vit"),
        outputs=["logits"],
    )


def test_set(limit: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Normalised images ``[N, 1, 28, 28]`` and labels ``[N]``."""
    with np.load(fashion.TEST_SET) as stored:
        images, labels = stored["images"][:limit], stored["labels"][:limit]
    scaled = (images.astype(np.float32) / 255 - fashion.MEAN) / fashion.STD
    return scaled[:, None].astype(np.float32), labels.astype(np.int64)


def accuracy(runnable: Runnable, limit: int) -> list[Metric]:
    """Top-1 accuracy on the first ``limit`` images."""
    images, labels = test_set(limit)
    found = [
        runnable.run({"images": images[start : start + BATCH]})["logits"].argmax(1)
        for start in range(0, len(images), BATCH)
    ]
    return [Metric("accuracy", np.concatenate(found) == labels)]


def main(argv: Sequence[str] | None = None) -> None:
    args = parser(__doc__, limit=10_000).parse_args(argv)
    finish(
        [
            study(
                f"Shipped ViT, Fashion-MNIST, {args.limit:,} test images",
                program(),
                lambda runnable: accuracy(runnable, args.limit),
                args,
                batch=8,
            )
        ],
        args,
    )


if __name__ == "__main__":
    main()
