"""Measures the models as ratios to a peer or a bound; see lab/benchmarks.md."""

import pipeline  # noqa: F401  before torch, whose threads heed what it says of waiting
