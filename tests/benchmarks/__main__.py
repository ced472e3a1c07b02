"""``make bench``: speed against what one would run without thresher."""

from tests.benchmarks.speed import main

main()
