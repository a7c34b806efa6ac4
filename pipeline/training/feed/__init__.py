"""The order of rows, and batches in that order."""
