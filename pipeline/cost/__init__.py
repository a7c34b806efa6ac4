"""Estimates of what stages will cost."""
