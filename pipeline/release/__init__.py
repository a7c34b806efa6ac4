"""Comparison of bundles, and the gates before a release."""
