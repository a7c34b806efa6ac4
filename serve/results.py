"""A cache of finished images by the keys of their recipes: the same request gets the same bytes without a drawing."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """An image as PNG, with its seed and its score."""

    png: bytes
    seed: int
    score: float | None


class ResultCache:
    """An LRU cache of images, up to ``most`` bytes.

    The name of an image in a URL cannot be guessed from its recipe: anyone who has the URL may read it.
    """

    def __init__(self, most: int):
        self.most, self.bytes = most, 0
        self.kept: OrderedDict[str, Result] = OrderedDict()
        self.secret = secrets.token_bytes(32)

    def name(self, key: str) -> str:
        """Returns the name of the image of a recipe's key."""
        return hashlib.blake2b(key.encode(), key=self.secret, digest_size=20).hexdigest()

    def get(self, name: str) -> Result | None:
        """Returns the image of a name, if it is kept."""
        if found := self.kept.get(name):
            self.kept.move_to_end(name)
        return found

    def keep(self, name: str, result: Result) -> Result:
        """Keeps an image, unless the same recipe has one, and returns the one that is kept."""
        if found := self.get(name):
            return found
        self.kept[name] = result
        self.bytes += len(result.png)
        while self.bytes > self.most and len(self.kept) > 1:
            self.bytes -= len(self.kept.popitem(last=False)[1].png)
        return result
