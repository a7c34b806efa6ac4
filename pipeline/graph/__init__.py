"""Stages, keys, plans, artefacts, shards and Ray. Knows neither images nor models."""
