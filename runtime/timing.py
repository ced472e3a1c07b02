"""What was measured of one candidate at one batch size, and what that says."""

from __future__ import annotations

from dataclasses import dataclass

from thresher.runtime.measure import Warmth
from thresher.runtime.stats import Ratio, Spread


@dataclass(frozen=True)
class Timing:
    """One candidate at one batch size.  ``latency`` in seconds of one run of the whole batch.

    ``speedup`` is over the first candidate, ``ideal`` the ratio of their multiply-accumulates,
    ``realised`` is speed-up / ideal.
    """

    candidate: str
    batch: int
    latency: Spread
    throughput: float  # samples per second
    warm_up: Warmth
    speedup: Ratio | None = None
    ideal: float | None = None
    realised: float | None = None

    def meets(self, least: float) -> bool:
        """Whether a demanded speed-up is met: by the median, if it is a gain at all."""
        ratio = self.speedup
        return (
            ratio is not None and ratio.median >= least and (least <= 1 or not ratio.inside_noise)
        )

    def verdict(self, base: str) -> str:
        """One sentence about the speed-up over the candidate of that name."""
        ratio = self.speedup
        assert ratio is not None, "the first candidate is compared with none"
        start = f"batch {self.batch}: {self.candidate}"
        interval = f"{ratio.confidence:.0%} interval {ratio.low:.2f} to {ratio.high:.2f}"
        if ratio.inside_noise:
            return f"{start}: no gain over {base}; {ratio.median:.2f} times ({interval}) is noise"
        if ratio.median < 1:
            return f"{start} is slower than {base}: {ratio.median:.2f} times its speed ({interval})"
        text = f"{start} is {ratio.median:.2f} times as fast as {base} ({interval})"
        if self.ideal and self.realised:
            text += f", {self.realised:.2f} of the ideal {self.ideal:.2f}"
        return text
