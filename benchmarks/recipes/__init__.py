"""Tries recipes of models at a fixed budget of processor seconds, and keeps a record; see docs/recipes.md."""
