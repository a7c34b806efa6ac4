"""Admission of requests: tokens, rate limits and limits of size, before anything of a request is parsed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
import shlex
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.data.pairs.image import MAX_BYTES
from pipeline.errors import UserError
from pipeline.local import read_local
from serve.errors import ApiError, broken
from serve.queue import Observe, late, stopping
from serve.settings import LOOPBACK, ServeSettings

JSON_BYTES = 64 << 10  # of a body that holds no image
FORM_BYTES = 2 * MAX_BYTES + JSON_BYTES  # of two images
ALL_BYTES = 1 << 30  # of all bodies whose requests are not answered yet; large ones lie on the disk
IN_MEMORY = 1 << 20  # of one body
CHUNK = 64 << 10
NO_ANSWER = 499  # nginx's status for a client that has gone
BODY_S = 30.0  # in which a body has to arrive
CONNECTIONS = 1000  # requests that are answered at once, waiting ones among them
GUARDED = ("/v1/", "/metrics")
OPEN = ("/v1/images/files/", "/v1/models")  # below /v1: an image's name is a secret, and the page asks for the model

log = logging.getLogger("unclip")
requests_log = logging.getLogger("unclip.requests")  # a JSON object a request; never a caption
HEADERS = [  # the page asks nobody but this server, and nobody may frame it
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def read_tokens(settings: ServeSettings) -> dict[str, str]:
    """Returns the names of tokens by their sha256, from a file of lines "NAME TOKEN".

    Raises UserError for a file without tokens or that other users of this machine may read or write, as ssh does for a
    key; and for an address that others reach if there are none.
    """
    text = os.environ.get("UNCLIP_TOKENS", "")
    if not settings.tokens and not text:
        if settings.host not in LOOPBACK:
            raise UserError(
                f"serve: host={settings.host} accepts other machines, so anybody could draw; write lines NAME TOKEN "
                "into a file and name it with tokens=FILE, or into UNCLIP_TOKENS"
            )
        return {}
    try:
        text = read_local(settings.tokens, 1 << 20).decode() if settings.tokens else text
        if settings.tokens and os.stat(settings.tokens).st_mode & 0o077:
            raise UserError(
                f"serve.tokens: other users of this machine may read or write {settings.tokens}; put its lines into "
                f"UNCLIP_TOKENS, or type chmod 600 {shlex.quote(settings.tokens)}"
            )
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"serve.tokens: {settings.tokens} cannot be read ({e})") from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or any(len(words) != 2 or len(words[1]) < 16 for words in lines):
        raise UserError(
            f"serve.tokens: {settings.tokens or 'UNCLIP_TOKENS'} does not hold lines NAME TOKEN, each token 16 "
            "characters or longer; openssl rand -hex 24 makes one"
        )
    return {hashlib.sha256(token.encode()).hexdigest(): name for name, token in lines}


class RateLimit:
    """The rate limit of one token: requests, megapixels and megabytes in a sliding minute; 0 sets no limit."""

    def __init__(self, limits: Mapping[str, float]):
        self.limits = limits
        self.spent: dict[str, deque[tuple[float, float]]] = {kind: deque() for kind in limits}

    def spend(self, kind: str, amount: float) -> tuple[float, float]:
        """Takes an amount, and returns when, with it. Raises ApiError if the last minute has no room for it."""
        limit, spent, now = self.limits[kind], self.spent[kind], time.monotonic()
        while spent and spent[0][0] < now - 60:
            spent.popleft()
        if limit and sum(one for _, one in spent) + amount > limit:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"This token may use {limit:g} {kind} a minute: try again later, or ask for less",
                retry_after=60 - (now - spent[0][0]) if spent else 60,
            )
        spent.append((now, amount))
        return spent[-1]

    def give_back(self, kind: str, spent: tuple[float, float]) -> None:
        """Takes back what ``spend`` returned."""
        with suppress(ValueError):  # a minute ago
            self.spent[kind].remove(spent)


@dataclass
class Traffic:
    """Counts the requests that are being answered.

    Attributes:
        open: Requests that were accepted and are not answered yet.
        draining: New requests are refused.
    """

    open: int = 0
    draining: bool = False

    def drain(self) -> None:
        """Begins to refuse new requests."""
        self.draining = True


# Of our own: FastAPI asks for a bearer token after it has read the body, and CORS headers stop no request. Starlette's
# limit of a body knows neither its kind, nor its time, nor that of all bodies together.
class Guard:
    """Lets requests through to ``app`` that come from somebody who may ask, and whose body is small and arrives."""

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, tokens: Mapping[str, str], observe: Observe, traffic: Traffic
    ):
        self.app, self.settings, self.tokens, self.observe, self.traffic = app, settings, tokens, observe, traffic
        self.limits = settings.limits()
        self.allowances = {name: RateLimit(self.limits) for name in (*tokens.values(), "")}
        self.held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, number = time.monotonic(), f"req_{secrets.token_hex(12)}"
        scope["status"] = NO_ANSWER

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
                message["headers"] = [*message["headers"], *HEADERS, (b"x-request-id", number.encode())]
            scope["sent"] = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        except (Exception, asyncio.CancelledError) as e:
            # An answer that has begun can only be cut off. uvicorn cancels what a drain has not ended.
            if scope["status"] != NO_ANSWER or (isinstance(e, asyncio.CancelledError) and not self.traffic.draining):
                raise
            error = e if isinstance(e, ApiError) else stopping() if isinstance(e, asyncio.CancelledError) else broken()
            if error is not e and isinstance(e, Exception):
                log.exception("%s could not be answered", scope["path"])
            self.observe("refusals_total", code=error.code)
            refusal = JSONResponse(error.body, error.status, headers={**error.headers, "Connection": "close"})
            await refusal(scope, receive, sending)
        finally:
            self.held -= scope.get("held", 0)
            self.traffic.open -= scope.get("accepted", False)
            if scope["path"].startswith("/v1/"):
                self._note(scope, number, time.monotonic() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Has ``app`` answer a request that may be, for as long as its client is there.

        Raises ApiError for one that may not be, and where the answer has not begun after ``deadline_s``.
        """
        body = await self._admit(scope, receive)
        if body is receive:
            await self.app(scope, receive, send)
            return
        gone = asyncio.ensure_future(receive())  # behind a whole body comes nothing but the client's end

        async def read() -> Message:
            return await body() or await asyncio.shield(gone)

        answer = asyncio.ensure_future(self.app(scope, read, send))
        both = (answer, gone)
        try:
            await asyncio.wait(both, timeout=self.settings.deadline_s, return_when="FIRST_COMPLETED")
            if not answer.done() and not gone.done():
                if scope["status"] == NO_ANSWER:
                    raise late(self.settings.deadline_s)
                await asyncio.wait(both, return_when="FIRST_COMPLETED")  # a stream, whose drawing has a deadline
            if answer.done() or scope.get("sent"):
                await answer
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.wait(both)

    def _note(self, scope: Scope, number: str, seconds: float) -> None:
        endpoint, status = _endpoint(scope), scope["status"]
        self.observe("requests_total", endpoint=endpoint, status=str(status))
        self.observe("e2e_request_latency_seconds", seconds, endpoint=endpoint)
        images, side = scope.get("drawing", (0, 0))
        about = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": number,
            "token": scope.get("token", ""),
            "endpoint": endpoint,
            "status": status,
            "ms": round(1000 * seconds),
        }
        requests_log.info("%s", json.dumps(about | ({"images": images, "size": f"{side}x{side}"} if images else {})))

    async def _admit(self, scope: Scope, receive: Receive) -> Callable[[], Awaitable[Any]]:
        """Returns what gives the parts of the body and then None; ``receive`` where it is read as it comes.

        Raises ApiError.
        """
        self._check_origin(scope)
        if not scope["path"].startswith(GUARDED) or scope["path"].startswith(OPEN):
            return receive
        scope["token"] = self._name(scope)
        scope["allowance"] = allowance = self.allowances[scope["token"]]
        if scope["path"] == "/metrics":
            return receive
        if self.traffic.draining:
            raise stopping()
        if self.traffic.open >= CONNECTIONS:
            raise ApiError(503, "unavailable", "Too many requests are being answered: try again later", retry_after=5)
        self.traffic.open += 1
        scope["accepted"] = True
        allowance.spend("requests", 1)
        return await self._whole(scope, receive, allowance)

    def _check_origin(self, scope: Scope) -> None:
        """Raises ApiError for a page of another address, which could make a browser draw behind its user's back."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        # DNS rebinding: a foreign page whose own name resolves to 127.0.0.1 has an origin that equals the host.
        if not self.tokens and _hostname(host) not in LOOPBACK:
            raise ApiError(403, "forbidden_host", f"The host {host!r} is not this machine: use 127.0.0.1")
        if origin and origin.partition("://")[2] != host and origin not in self.settings.origins:
            raise ApiError(403, "forbidden_origin", f"Pages of {origin} may not call this server; see origins")

    def _name(self, scope: Scope) -> str:
        """Returns whose token a request has. Raises ApiError where it has none."""
        if not self.tokens:
            return ""
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        name = self.tokens.get(hashlib.sha256(token.strip().encode()).hexdigest())
        if kind.lower() != "bearer" or name is None:
            raise ApiError(401, "invalid_api_key", "Send one of the server's tokens: Authorization: Bearer TOKEN")
        return name

    async def _whole(
        self, scope: Scope, receive: Receive, allowance: RateLimit
    ) -> Callable[[], Awaitable[Message | None]]:
        """Returns what gives the parts of a body that has arrived whole, then None.

        Raises ApiError for one that is too large or too slow, and where too much is held already.
        """
        headers = Headers(scope=scope)
        form = headers.get("content-type", "").startswith("multipart/form-data")
        most, size = FORM_BYTES if form else JSON_BYTES, 0
        too_large = ApiError(413, "too_large", f"The body has more than {most >> 10} KiB: send less")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        body = SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - it lives as long as what is returned
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(NO_ANSWER, "disconnected", "The body arrived incomplete: try again")
                    body.write(chunk := message.get("body", b""))
                    size += len(chunk)
                    self.held += len(chunk)
                    scope["held"] = size
                    if size > most:
                        raise too_large
                    if self.held > ALL_BYTES:
                        raise ApiError(503, "unavailable", "Too many uploads are in progress", retry_after=5)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, "timeout", f"The body took more than {BODY_S:g} seconds: try again") from None
        allowance.spend("megabytes", size / 1e6)
        body.seek(0)

        async def replay() -> Message | None:
            if body.closed:
                return None
            chunk = body.read(CHUNK)
            more = body.tell() < size
            if not more:
                body.close()
            return {"type": "http.request", "body": chunk, "more_body": more}

        return replay


def _endpoint(scope: Scope) -> str:
    """Returns the path of the endpoint that a request is for, also of one that was refused before it got there."""
    matching = (route for route in scope["app"].routes if route.matches(scope)[0] is not Match.NONE)
    return getattr(scope.get("route") or next(matching, None), "path", "") or "none"


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
