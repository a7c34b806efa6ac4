"""Reads images from the store as views: neighbours together, every image checked, the latest views cached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import numpy as np

from pipeline.data.pairs.decoding import read_pair_pixels
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.store import Store

CACHE_MB = 512
View = Future[np.ndarray]


def at_once(function: Callable[..., np.ndarray], *arguments: object) -> View:
    """Calls a function as ``Executor.submit`` does, but in this thread, before it returns."""
    future: View = Future()
    future.set_result(function(*arguments))
    return future


class Views:
    """Opens views of one size, uint8 [3, size, size], and caches the latest ``cache_mb`` MiB of them.

    Any thread may fetch; only one thread may ask for views.
    """

    def __init__(self, store: Store, size: int, cache_mb: int = CACHE_MB):
        self.store, self.size = store, size
        self.room = (cache_mb << 20) // max(1, 3 * size * size)
        self._views: OrderedDict[Place, View] = OrderedDict()

    def fetch(self, places: Iterable[Place]) -> dict[Place, bytes]:
        """Returns the stored bytes of those images whose views are not cached. Raises CorruptObject."""
        wanted = [place for place in dict.fromkeys(places) if place not in self._views]
        return dict(zip(wanted, read_images(self.store, wanted), strict=True))

    def views(
        self, places: Sequence[Place], fetched: dict[Place, bytes], submit: Callable[..., View] = at_once
    ) -> list[View]:
        """Returns the views of images: cached, decoded from ``fetched``, or read again where both lack an image.

        ``submit`` decodes: ``at_once``, or the method of a pool.
        """
        new = [place for place in dict.fromkeys(places) if place not in self._views]
        data = self.fetch(place for place in new if place not in fetched) | fetched
        for place in new:
            self._views[place] = submit(self._open, place, data[place])
        result = [self._views[place] for place in places]
        for place in places:
            self._views.move_to_end(place)
        while len(self._views) > self.room:
            self._views.popitem(last=False)
        return result

    def _open(self, place: Place, data: bytes) -> np.ndarray:
        view = read_pair_pixels(place.key, data, self.size, in_place=place.in_place)
        return np.ascontiguousarray(view.transpose(2, 0, 1))
