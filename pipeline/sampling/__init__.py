"""Bundles, and images that are drawn with them."""
