"""Asks a vision model of an OpenAI-compatible endpoint for captions, which stand before those of the list."""
