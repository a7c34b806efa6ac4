"""Who may ask, how much, and what a request may weigh: before anything of it is parsed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.data.pairs.image import MAX_BYTES
from pipeline.errors import UserError
from pipeline.local import read_local
from serve.errors import ApiError, broken
from serve.queue import Observe
from serve.settings import ServeSettings

JSON_BYTES = 64 << 10  # of a body that holds no image
FORM_BYTES = 2 * MAX_BYTES + JSON_BYTES  # of two images
ALL_BYTES = 1 << 30  # of all bodies that are held at once
NO_ANSWER = 499  # nginx's status for a client that has gone
BODY_S = 30.0  # in which a body has to arrive
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GUARDED = ("/v1/", "/metrics")
OPEN = ("/v1/images/files/", "/v1/models")  # below /v1: an image's name is a secret, and the page asks for the model

log = logging.getLogger("unclip")
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
                f"serve: host={settings.host} lets others in, and anybody could draw; write lines NAME TOKEN into a "
                "file and name it with tokens=FILE, or into UNCLIP_TOKENS"
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
    """What one token may spend in a minute, of requests, megapixels and megabytes; 0 sets no limit."""

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


class Guard:
    """Lets requests through to ``app`` that come from somebody who may ask, and whose body is small and arrives."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, tokens: Mapping[str, str], observe: Observe):
        self.app, self.settings, self.tokens, self.observe = app, settings, tokens, observe
        self.limits = {
            "requests": settings.requests_per_minute,
            "megapixels": settings.megapixels_per_minute,
            "megabytes": settings.megabytes_per_minute,
        }
        self.allowances = {name: RateLimit(self.limits) for name in (*tokens.values(), "")}
        self.held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), NO_ANSWER

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        try:
            try:
                receive = await self._admit(scope, receive)
            except ApiError as e:
                self.observe("refusals_total", code=e.code)
                app: ASGIApp = JSONResponse(e.body, e.status, headers={**e.headers, "Connection": "close"})
            else:
                app = self.app
            try:
                await app(scope, receive, sending)
            except Exception:
                if status != NO_ANSWER:  # the answer has begun
                    raise
                log.exception("%s could not be answered", scope["path"])
                error = broken()
                await JSONResponse(error.body, error.status)(scope, receive, sending)
        finally:
            self.held -= scope.get("held", 0)
            if scope["path"].startswith("/v1/"):
                endpoint = getattr(scope.get("route"), "path", "none")
                self.observe("requests_total", endpoint=endpoint, status=str(status))
                self.observe("e2e_request_latency_seconds", time.monotonic() - began, endpoint=endpoint)

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """Returns what the request is read from. Raises ApiError."""
        self._check_origin(scope)
        if not scope["path"].startswith(GUARDED) or scope["path"].startswith(OPEN):
            return receive
        scope["allowance"] = allowance = self.allowances[self._name(scope)]
        if scope["path"] == "/metrics":
            return receive
        allowance.spend("requests", 1)
        return await self._whole(scope, receive, allowance)

    def _check_origin(self, scope: Scope) -> None:
        """Raises ApiError for a page of another address, which could make a browser draw behind its user's back."""
        host, origin = _header(scope, b"host"), _header(scope, b"origin")
        if not self.tokens and _hostname(host) not in LOOPBACK:
            raise ApiError(403, "forbidden_host", f"The host {host!r} is not this machine: use 127.0.0.1")
        if origin and origin.partition("://")[2] != host and origin not in self.settings.origins:
            raise ApiError(403, "forbidden_origin", f"Pages of {origin} may not call this server; see origins")

    def _name(self, scope: Scope) -> str:
        """Returns whose token a request has. Raises ApiError where it has none."""
        if not self.tokens:
            return ""
        kind, _, token = _header(scope, b"authorization").partition(" ")
        name = self.tokens.get(hashlib.sha256(token.strip().encode()).hexdigest())
        if kind.lower() != "bearer" or name is None:
            raise ApiError(401, "invalid_api_key", "Send one of the server's tokens: Authorization: Bearer TOKEN")
        return name

    async def _whole(self, scope: Scope, receive: Receive, allowance: RateLimit) -> Receive:
        """Returns a body that has arrived whole.

        Raises ApiError for one that is too large or too slow, and where too much is held already.
        """
        form = _header(scope, b"content-type").startswith("multipart/form-data")
        most, body = FORM_BYTES if form else JSON_BYTES, bytearray()
        too_large = ApiError(413, "too_large", f"The body has more than {most >> 10} KiB: send less")
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    self.held += len(body) - scope.get("held", 0)
                    scope["held"] = len(body)
                    if len(body) > most:
                        raise too_large
                    if self.held > ALL_BYTES:
                        raise ApiError(503, "unavailable", "Too many images are on their way here", retry_after=5)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, "timeout", f"The body took more than {BODY_S:g} seconds: try again") from None
        allowance.spend("megabytes", len(body) / 1e6)
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            whole = bytes(body)
            body.clear()
            self.held -= scope.pop("held", 0)  # a form that is read lies on the disk
            return {"type": "http.request", "body": whole, "more_body": False}

        return replay


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")
