"""What the models cost, as ratios to a peer or a bound; see docs/benchmarks.md."""
