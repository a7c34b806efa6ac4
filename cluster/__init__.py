"""Cluster definitions."""
