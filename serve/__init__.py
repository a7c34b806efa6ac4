"""Draws images over HTTP with a trained bundle."""
