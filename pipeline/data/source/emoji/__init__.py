"""The emoji set: a list and its images, drawn on demand."""
