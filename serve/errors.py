"""Errors for clients: OpenAI's, each with the status that its clients expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = 60  # characters of a wrong value that a message repeats
EXPECTED = {"int": "a whole number", "float": "a number", "finite": "a number", "bool": "true or false"}
BOUNDS = {"greater_than_equal": ("ge", "or more"), "less_than_equal": ("le", "or less")}


class ApiError(Exception):
    """A request that is not answered with images; ``status`` is HTTP's.

    Args:
        status: 400, 401, 403, 404, 408, 413, 429, 499 (of a client that has gone), 500 or 503.
        code: A word for programs.
        message: Text for people: what happened, to what, and what to do next.
        param: The field that is wrong.
        retry_after: Seconds until it is worth trying again.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None, retry_after: float = 0):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after = status, code, message, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """Returns the body of the answer."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """Returns the headers of the answer."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(max(1, round(self.retry_after)))} if self.retry_after else {}


def broken() -> ApiError:
    """Returns the error for a fault of the server's own, which its log has."""
    return ApiError(500, "server_error", "The server failed, and its log says why: try another request")


def invalid(message: str, param: str | None = None) -> ApiError:
    """Returns the error for a request that can never be answered as it is; ``param`` is the field that is wrong."""
    return ApiError(400, "invalid_request", message, param)


def unreadable(error: Mapping[str, Any]) -> ApiError:
    """Returns pydantic's first error of a body as a client should read it."""
    kind, given, context = str(error["type"]), error.get("input"), error.get("ctx", {})
    where = [part for part in error["loc"] if part not in ("body", "query")]
    if kind == "json_invalid":
        return invalid(f"The body is not JSON ({context['error']}, at character {where[0]})")
    if not where:
        empty = "empty" if kind == "missing" else "not a JSON object"
        return invalid(f'The body is {empty}: send JSON, such as {{"prompt": "a red fox"}}, as application/json')
    name = str(where[0])
    shown = repr(given) if len(repr(given)) <= SHOWN else f"{repr(given)[:SHOWN]} ..."
    expected = EXPECTED.get(kind.partition("_")[0], "text")
    if kind == "missing":
        message = f"{name} is missing"
    elif kind == "literal_error":
        message = f"{name} is {shown}: use {context['expected']}"
    elif kind in BOUNDS:
        bound, word = BOUNDS[kind]
        message = f"{name} is {shown}: use {context[bound]} {word}"
    elif kind == "string_too_long":
        message = f"{name} has {len(str(given))} characters: use {context['max_length']} or less"
    elif kind == "none_required":
        message = f"{name} has no meaning here: leave it out"
    elif kind == "value_error" and "UploadFile" in str(context.get("error")):
        message = f"{name} is not a file: send it as a file of a multipart/form-data body"
    else:
        message = f"{name} is {shown}: use {expected}"
    return invalid(message, name)
