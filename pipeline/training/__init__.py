"""Trains the models: feed, loop, checkpoints and workers."""
