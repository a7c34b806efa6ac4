"""Pictures from the store as views: neighbours read together, every picture checked, the latest views kept at hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import numpy as np

from models.view import open_view
from pipeline.data.pairs.row_index import Place, read_images
from pipeline.errors import UserError
from pipeline.store import Store

CACHE_MB = 512
View = Future[np.ndarray]


def at_once(function: Callable[..., np.ndarray], *arguments: object) -> View:
    """As ``Executor.submit``, but called here and now."""
    future: View = Future()
    future.set_result(function(*arguments))
    return future


class Pictures:
    """Views of one size, uint8 [3, size, size]; the latest ``cache_mb`` MiB of them stay in memory.

    Any thread may fetch; one alone asks for views.
    """

    def __init__(self, store: Store, size: int, cache_mb: int = CACHE_MB):
        self.store, self.size = store, size
        self.room = (cache_mb << 20) // max(1, 3 * size * size)
        self._views: OrderedDict[Place, View] = OrderedDict()

    def fetch(self, places: Iterable[Place]) -> dict[Place, bytes]:
        """The stored bytes of those pictures whose views are not at hand. Raises CorruptObject."""
        wanted = [place for place in dict.fromkeys(places) if place not in self._views]
        return dict(zip(wanted, read_images(self.store, wanted), strict=True))

    def views(
        self, places: Sequence[Place], fetched: dict[Place, bytes], submit: Callable[..., View] = at_once
    ) -> list[View]:
        """The views of pictures, from memory or from ``fetched``; read again if it is in neither any more. ``submit``
        is given what must be decoded: ``at_once``, or that of a pool."""
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
        try:
            return np.ascontiguousarray(open_view(data, self.size).transpose(2, 0, 1))
        except (OSError, ValueError) as e:
            raise UserError(f"the picture of row {place.key} cannot be opened ({e}): take the row off the list") from e
