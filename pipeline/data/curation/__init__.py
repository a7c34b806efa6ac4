"""Curation: which rows models are trained on."""
