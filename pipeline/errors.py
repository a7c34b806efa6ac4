"""Errors that a person can do something about."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what was asked for, or in the machine it was asked of: one line, what to do next, no traceback."""


def install(extra: str) -> str:
    """Returns how to install the packages of an extra of pyproject.toml, for the end of a message.

    By their own names: no index has this project, and somebody who took its name there could run their code.
    """
    # Imported here: no other message, and no help of a command, should wait for them.
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in requires("unclip-ray") or ()]
    except PackageNotFoundError:
        return f"install the extra {extra} of pyproject.toml"
    wanted = [each for each in asked if each.marker and each.marker.evaluate({"extra": extra})]
    packages = [each for each in wanted if each.marker and not each.marker.evaluate({"extra": ""})]
    names = (f"{each.name}[{','.join(each.extras)}]".removesuffix("[]") + str(each.specifier) for each in packages)
    return f"{shlex.join(['pip', 'install', *names])} installs what is missing"


class Unreachable(UserError):
    """A server did not answer, or answered that it cannot, for as long as one request may wait. It may later."""


class OtherFormat(UserError):
    """A record was written by a newer or an older version of this software. ``why`` says so without its name."""

    def __init__(self, name: str, why: str):
        super().__init__(f"{name} {why}")
        self.name, self.why = name, why

    def __reduce__(self) -> tuple[type[OtherFormat], tuple[str, str]]:  # it crosses processes
        return type(self), (self.name, self.why)


class CorruptObject(Exception):
    """A stored object is missing, its bytes do not match its name, or it is not an object of its kind.

    ``path`` is the object in the store. ``unclip data check --repair`` quarantines it with the records that name it, so
    that the next run makes them again.
    """

    def __init__(self, path: str, why: str):
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why

    def __reduce__(self) -> tuple[type[CorruptObject], tuple[str, str]]:  # it crosses processes
        return type(self), (self.path, self.why)


class Superseded(Exception):
    """A later attempt of a training has begun, in another process, and this one stops."""


def did_you_mean(word: object, words: Iterable[object], mark: str = "") -> str:
    """Returns the end of a message about an unknown word: the known word nearest to it, or else all of them.

    ``mark`` stands before each known word, such as the dashes of options.
    """
    known = sorted(map(str, words))
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.65)
    return f"; did you mean {mark}{close[0]}?" if close else f"; known are {', '.join(mark + w for w in known)}"
