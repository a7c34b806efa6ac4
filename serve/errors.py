"""Errors for clients: OpenAI's, each with the status that its clients expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that is not answered with images; ``status`` is HTTP's.

    Args:
        status: 400, 401, 403, 404, 408, 413, 429, 500 or 503.
        code: A word for programs.
        message: What happened, to what, and what to do next.
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
        return {"Retry-After": str(max(1, round(self.retry_after)))} if self.retry_after else {}


def broken() -> ApiError:
    """Returns the error for a fault of the server's own, which its log has."""
    return ApiError(500, "server_error", "This could not be done, by a fault that the server's log has: try another")
