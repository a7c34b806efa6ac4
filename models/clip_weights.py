"""How a configuration names a CLIP that somebody else has trained. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

PATTERN = r"open_clip:[^:]+:[^:]+|local-dir:.+"
"""Matches the whole name, "open_clip:NAME:TAG" or "local-dir:FOLDER"."""


@dataclass(frozen=True)
class ClipWeights:
    """Names open_clip's ``network`` with weights ``tag``, or the ``folder`` of a CLIP in its local-dir layout."""

    network: str = ""
    tag: str = ""
    folder: str = ""

    @classmethod
    def parse(cls, name: str) -> ClipWeights:
        """Returns the parts of a name that PATTERN matches; all are empty for "train"."""
        kind, _, rest = name.partition(":")
        if kind == "local-dir":
            return cls(folder=rest)
        network, _, tag = rest.partition(":")
        return cls(network, tag)
