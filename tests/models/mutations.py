"""Deliberate faults in the code under test: a comparison that notices none of them compares nothing.

    @fails_under((q_sample, "(1 - alpha_bar)", "alpha_bar"))
    def test_q_sample_equals_a_peer() -> None: ...

The test runs once as it is, and once more under each fault, where it must raise AssertionError.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

Mutation = tuple[Any, str, str]
"""A function, class or module, a fragment of its source, and what to put in the fragment's place."""


@contextmanager
def mutated(target: Any, old: str, new: str) -> Iterator[None]:
    """Within it the function that has ``old`` in its source runs with ``new`` instead, wherever it was imported.

    ``target`` is that function, or a class or module in which to look for it. Only the body of a function can change:
    its code object is replaced, so decorators, defaults and constants of modules stay as they are. Raises ValueError
    when ``old`` does not occur exactly once in the source, stands outside the body of a function, or when ``new`` has
    another number of lines or makes no difference.
    """
    forget = getattr(target, "cache_clear", lambda: None)  # of a function that keeps its results
    target = inspect.unwrap(target) if callable(target) else target
    module = target if isinstance(target, ModuleType) else inspect.getmodule(target)
    assert module is not None
    whole, part = inspect.getsource(module), inspect.getsource(target)
    if part.count(old) != 1:
        raise ValueError(f"{old!r} occurs {part.count(old)} times in {target.__name__}: name a fragment of one place")
    if old.count("\n") != new.count("\n"):
        raise ValueError(f"{new!r} has not as many lines as {old!r}: the functions below would move")
    at = whole.index(part) + part.index(old)
    faulty = whole[:at] + new + whole[at + len(old) :]
    sound, broken = (compile(source, str(module.__file__), "exec") for source in (whole, faulty))
    code = _changed_function(sound, broken)
    if code is None:
        raise ValueError(f"putting {new!r} for {old!r} in {target.__name__} changes no code of a function")
    function = _resolve(module, code.co_qualname)
    original, function.__code__ = function.__code__, code
    forget()
    try:
        yield
    finally:
        function.__code__ = original
        forget()


def fails_under(*mutations: Mutation) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the test passes if it passes, and raises AssertionError under every single mutation."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            test(*args, **kwargs)
            for target, old, new in mutations:
                with mutated(target, old, new):
                    try:
                        test(*args, **kwargs)
                    except AssertionError:
                        continue
                pytest.fail(f"{test.__name__} does not notice {new!r} in the place of {old!r}")

        return run

    return decorate


def _changed_function(sound: CodeType, broken: CodeType) -> CodeType | None:
    """The outermost function within ``broken`` that does something else than in ``sound``."""
    pairs = zip(_inner(sound), _inner(broken), strict=True)
    for before, after in ((a, b) for a, b in pairs if _behaviour(a) != _behaviour(b)):
        return after if after.co_flags & inspect.CO_OPTIMIZED else _changed_function(before, after)
    return None


def _behaviour(code: CodeType) -> tuple[Any, ...]:
    """All of a code object but where its instructions stand in the file."""
    constants = tuple(_behaviour(c) if isinstance(c, CodeType) else (type(c), c) for c in code.co_consts)
    return (code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants)


def _inner(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _resolve(module: ModuleType, qualname: str) -> FunctionType:
    """The function of that name, under its decorators."""
    owner: Any = module
    *owners, name = qualname.split(".")
    for each in owners:
        owner = getattr(owner, each)
    found = vars(owner)[name]
    found = inspect.unwrap(found.fget if isinstance(found, property) else getattr(found, "__func__", found))
    assert isinstance(found, FunctionType)
    return found
