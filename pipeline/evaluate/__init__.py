"""Measures on held-out rows whether the models learn."""
