"""What captions say in fixed words: how they begin, what they name, and on which background.

Style and background words alone find a good part of the right captions, so that retrieval among whole captions flatters
a model that knows them and no names. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

from pydantic import Field


class Parts(NamedTuple):
    """The words of a caption before its name, the name ("a cat face"), and those after it; "" for none."""

    style: str
    name: str
    background: str

    def called(self, name: str) -> str:
        """Returns the caption that differs in the name alone."""
        return " ".join(part for part in (self.style, name, self.background) if part)


Frame = tuple[str, str]  # a style and a background
Shade = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True)
class Phrases:
    """Lists the fixed words of a list's captions; without any, no figure goes by what a caption names.

    Attributes:
        styles: How a caption begins, such as ``[a flat drawing of]``; other captions do not count. With none, all
            captions count.
        backgrounds: How a caption ends, and the colour that it names as red, green and blue of 0 to 255, such as
            ``{on a red background: [200, 0, 0]}``; ``""`` has the colour behind captions that name none.
        variants: Words of names that say which of many alike things is meant, such as ``[skin tone]``. Claim (g) and
            the figures beside it leave these captions out.
    """

    styles: tuple[str, ...] = ()
    backgrounds: dict[str, tuple[Shade, Shade, Shade]] = field(default_factory=dict)
    variants: tuple[str, ...] = ()

    @property
    def named(self) -> bool:
        """Returns whether captions have parts at all."""
        return bool(self.styles or self.backgrounds)

    def parts(self, caption: str) -> Parts | None:
        """Returns the parts of a caption; None for one that does not begin with a style, or that has no name."""
        style = next((style for style in self.styles if caption.startswith(f"{style} ")), "")
        if (self.styles and not style) or not self.named:
            return None
        ends = (words for words in self.backgrounds if words and caption.endswith(f" {words}"))
        background = max(ends, key=len, default="")
        name = caption[len(style) : len(caption) - len(background)].strip()
        return Parts(style, name, background) if name else None

    def background(self, caption: str) -> str:
        """Returns the background that a caption names, "" for none."""
        found = self.parts(caption)
        return found.background if found else ""

    def frame(self, caption: str) -> Frame | None:
        """Returns the style and the background of a caption; None for a caption without parts."""
        found = self.parts(caption)
        return (found.style, found.background) if found else None

    def is_variant(self, caption: str) -> bool:
        """Returns whether the caption has words of ``variants``."""
        return any(words in caption for words in self.variants)

    def group(self, caption: str) -> Frame | None:
        """Returns the frame of a caption that names a thing; None also for a variant."""
        return None if self.is_variant(caption) else self.frame(caption)

    def in_frames(self, captions: Sequence[str], count: int) -> list[int]:
        """Returns at most ``count`` places among ``captions``, in order, for figures of names.

        These are the first captions beside which another one differs in the name alone, each name once in a style and
        on a background. So more captions after them change nothing. Without phrases they are the first different
        captions.
        """
        frames: dict[Frame, dict[str, int]] = {}
        chosen: set[int] = set()
        for i, caption in enumerate(captions):
            found = self.parts(caption) if self.named else Parts("", caption, "")
            if found is None or not found.name or self.is_variant(caption):
                continue
            names = frames.setdefault((found.style, found.background), {})
            if names.setdefault(found.name, i) == i and len(names) > self.named:
                more = chosen | set(names.values())
                chosen = more if len(more) <= count else chosen
        return sorted(chosen)

    def alike(self, captions: Sequence[str], others: Sequence[str]) -> list[int]:
        """Returns as many places among ``others`` as there are ``captions``, far apart.

        For a caption that names a background it is one that names one, if there is any, and for another caption
        another. So sets differ by what was not chosen for.
        """
        pools: dict[bool, list[int]] = {True: [], False: []}
        for i, caption in enumerate(others):
            pools[bool(self.background(caption))].append(i)
        kinds = [bool(self.background(caption)) for caption in captions]
        seen, found = {True: 0, False: 0}, []
        for kind in kinds:
            pool = pools[kind] or pools[not kind]
            found.append(pool[seen[kind] * len(pool) // kinds.count(kind)])
            seen[kind] += 1
        return found
