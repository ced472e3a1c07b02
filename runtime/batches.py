"""Samples in whatever batches an engine was built for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from thresher.runtime.feeds import Array
from thresher.runtime.runner import Runnable
from thresher.runtime.sample import batch_symbol


def run_in_batches(model: Runnable, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of all samples, in the batches that the model takes.

    A batch that is too large is cut up, one that is too small is filled up with its last sample,
    whose outputs are then left out.  For quality, not for time.
    """
    axis = batch_symbol(model.inputs)
    low, high = model.ranges.get(axis or "", (1, None))
    given = {spec.name for spec in model.inputs if spec.shape and spec.shape[0] == axis}
    count = next((len(feeds[name]) for name in feeds if name in given), low)
    if axis is None or (low <= count and (high is None or count <= high)):
        return model.run(feeds)
    parts = []
    for start in range(0, count, high or count):
        size = min(high or count, count - start)
        rows = np.minimum(np.arange(start, start + max(size, low)), start + size - 1)
        part = {name: v[rows] if name in given else v for name, v in feeds.items()}
        parts.append({name: v[:size] for name, v in model.run(part).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
