"""The quick start's world: drawings of named parts, listed and drawn on demand."""
