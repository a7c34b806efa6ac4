"""What a run needs, checked before it starts: one finding a line."""
