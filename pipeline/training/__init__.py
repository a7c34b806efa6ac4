"""Order, feed, loop, checkpoints and launch of every training."""
