"""Workers of a training: their start, their process group, sharded models."""
