"""Asks an OpenAI-compatible endpoint for the caption of an image, and judges what it answers."""

from __future__ import annotations

import base64
import json
import os
import re
import time
import unicodedata
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, NamedTuple

from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, TimeoutError
from urllib3.util import parse_url

from pipeline.data.recaption.recipe import RecaptionRecipe, RecaptionSettings
from pipeline.errors import Unreachable, UserError
from pipeline.terminal import printable

URL, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"  # environment variables, as OpenAI's own clients read them
RETRIED = (408, 429, 500, 502, 503, 504)
ENDS = (401, 402, 403, 404)  # no row's fault: the key, the account, the model or the URL
FAULTS = frozenset({"http_5xx", "rate_limited", "timeout", "unreachable"})  # of the server; another day it may answer
FAULTS_IN_A_ROW = 20  # after which the run stops, and no more rows are counted as lost
LONGEST_PAUSE_S = 600
ANSWER_BYTES = 1 << 20
QUOTED = 200  # characters of an error of the endpoint
# As models begin an answer that is none.
REFUSAL = re.compile(
    r"(I'm|I am|We're|We are) (very |really )?(sorry|unable|not able|afraid)\b|(I|We) (can't|cannot|won't|don't)\b"
    r"|(Sorry|Unfortunately|Apologies),|As an AI\b|I apologi[sz]e",
    re.IGNORECASE,
)
NO_TEXT = {"Cc", "Cs", "Co", "Cn"}  # Unicode categories: control, halves of characters, private use, unassigned


class CaptionAnswer(NamedTuple):
    """Holds what an endpoint made of an image.

    Attributes:
        caption: The caption; None where there is a reason.
        reason: One of pipeline.ledger.REASONS; None where there is a caption.
        prompt_tokens: Tokens of the request, as the endpoint counts them; 0 where it does not.
        answer_tokens: Tokens of the answer, likewise.
    """

    caption: str | None
    reason: str | None
    prompt_tokens: int = 0
    answer_tokens: int = 0


def judge_caption(text: object, most: int) -> CaptionAnswer:
    """Returns the caption that a model's text is, on one line, or why it is none. ``most`` characters are taken."""
    if text is None:
        return CaptionAnswer(None, "empty_answer")
    if not isinstance(text, str):
        return CaptionAnswer(None, "not_text")
    caption = " ".join(text.split())
    if not caption:
        return CaptionAnswer(None, "empty_answer")
    if REFUSAL.match(caption.replace("\u2019", "'")):
        return CaptionAnswer(None, "refused")
    if "\ufffd" in caption or not any(map(str.isalpha, caption)):
        return CaptionAnswer(None, "not_text")
    if any(unicodedata.category(letter) in NO_TEXT for letter in caption):
        return CaptionAnswer(None, "not_text")
    return CaptionAnswer(None, "answer_too_long") if len(caption) > most else CaptionAnswer(caption, None)


def read_completion(data: bytes, most: int) -> CaptionAnswer:
    """Returns the answer that the body of a chat completion holds."""
    try:
        completion = json.loads(data)
        choice = completion["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        text, refused = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return CaptionAnswer(None, "malformed_answer")
    usage = completion.get("usage")
    tokens = [_tokens(usage, name) for name in ("prompt_tokens", "completion_tokens")]
    if refused or ended == "content_filter":
        return CaptionAnswer(None, "refused", *tokens)
    if ended == "length":  # it breaks off within a sentence
        return CaptionAnswer(None, "answer_too_long", *tokens)
    return CaptionAnswer(*judge_caption(text, most)[:2], *tokens)


def _tokens(usage: object, name: str) -> int:
    count = usage.get(name) if isinstance(usage, Mapping) else 0
    return count if isinstance(count, int) and 0 <= count < 1 << 31 else 0


class Endpoint:
    """Sends one request for each image. Any thread may call it.

    Args:
        recipe: Model, prompt and parameters.
        settings: Address and pace.
        environment: Environment variables, which may hold address and key.

    Raises:
        UserError: No address is known, or it is none.
    """

    def __init__(
        self, recipe: RecaptionRecipe, settings: RecaptionSettings, environment: Mapping[str, str] = os.environ
    ):
        self._recipe = recipe
        base = (settings.url or environment.get(URL, "")).rstrip("/")
        if not base:
            raise UserError(
                f"recaption: no endpoint is named; set run.recaption.url, or {URL} in the environment of every worker, "
                "to its base URL, such as http://localhost:8000/v1"
            )
        self._url = f"{base}/chat/completions"
        try:
            parts = parse_url(self._url)
        except HTTPError:
            parts = parse_url("")
        if parts.scheme not in ("http", "https") or not parts.host or parts.auth:
            raise UserError(
                f"recaption: the base URL of the endpoint (run.recaption.url or {URL}) is not of the form "
                "https://host/v1, without a password"
            )
        self.host = parts.netloc
        headers = {"Content-Type": "application/json"}
        self._key = environment.get(KEY, "")
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        retry = Retry(
            settings.retries,
            status_forcelist=RETRIED,
            allowed_methods=None,  # a POST too: asked twice, a model answers twice and changes nothing
            backoff_factor=1,
            backoff_jitter=1,
            backoff_max=LONGEST_PAUSE_S,
            retry_after_max=LONGEST_PAUSE_S,
            raise_on_status=False,
        )
        timeout = Timeout(connect=min(10.0, settings.timeout_s), read=settings.timeout_s)
        self._pool = PoolManager(1, headers, maxsize=settings.concurrency, retries=retry, timeout=timeout)
        self._interval, self._next = 60 / settings.per_minute if settings.per_minute else 0.0, time.monotonic()
        self._lock, self._faults = Lock(), 0

    def ask(self, image: bytes) -> CaptionAnswer:
        """Returns the answer for an image, the bytes of a JPEG.

        Raises:
            UserError: The endpoint refuses all requests.
            Unreachable: FAULTS_IN_A_ROW requests, with their retries, have failed one after the other.
        """
        status, data = self._send(image)
        if status in ENDS:
            raise UserError(f"recaption: {self.host} {self._refusal(int(status), data)}")
        if status == 200:
            answer = read_completion(data, self._recipe.max_characters)
        else:
            answer = CaptionAnswer(None, status if isinstance(status, str) else _reason(status))
        with self._lock:
            self._faults = self._faults + 1 if answer.reason in FAULTS else 0
            if self._faults >= FAULTS_IN_A_ROW:
                raise Unreachable(
                    f"recaption: {self._faults} requests to {self.host} failed in a row, the last with "
                    f"{answer.reason}; earlier answers are kept: check the endpoint, then run the same command again"
                )
        return answer

    def check(self, image: bytes) -> None:
        """Sends one request. Raises UserError unless it is answered: then no row will be."""
        status, data = self._send(image)
        if isinstance(status, str):
            why = f"does not answer ({status}); see that it runs, and that run.recaption.url is its base URL"
            raise Unreachable(f"recaption: {self.host} {why}")
        if status != 200:
            raise UserError(f"recaption: {self.host} {self._refusal(status, data)}")

    def _refusal(self, status: int, data: bytes) -> str:
        remedy = {401: f"set {KEY}", 402: "pay", 403: f"see what the key of {KEY} may", 404: "see recaption.model"}
        text = " ".join(data.decode(errors="replace").split())
        if self._key and (status in (401, 403) or self._key in text):  # 401 may repeat a part of it
            text = ""
        said = f": {printable(text)[:QUOTED]}" if text else ""
        todo = remedy.get(status, "see recaption.model and recaption.parameters")
        return f"refuses requests with status {status}{said}; {todo}, and run again"

    def _send(self, image: bytes) -> tuple[int | str, bytes]:
        """Returns the status and the body of the answer, or a reason where there is none."""
        self._wait_for_turn()
        try:
            with self._pool.request(
                "POST", self._url, body=self._body(image), preload_content=False, redirect=False
            ) as response:
                data = response.read(ANSWER_BYTES + 1)
                if len(data) > ANSWER_BYTES:
                    return "malformed_answer", b""
                response.drain_conn()
                return response.status, data
        except MaxRetryError as e:
            late = isinstance(e.reason, TimeoutError) and not isinstance(e.reason, NewConnectionError)
            return ("timeout" if late else "unreachable"), b""
        except TimeoutError:
            return "timeout", b""
        except HTTPError:
            return "unreachable", b""

    def _body(self, image: bytes) -> bytes:
        url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "text", "text": self._recipe.prompt}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": content}]
        request: dict[str, Any] = {"model": self._recipe.model, "messages": messages, **self._recipe.parameters}
        return json.dumps(request).encode()

    def _wait_for_turn(self, sleep: Callable[[float], None] = time.sleep) -> None:
        if not self._interval:
            return
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._interval
        sleep(max(0.0, turn - time.monotonic()))


def _reason(status: int) -> str:
    if status == 429:
        return "rate_limited"
    return "http_5xx" if status >= 500 else "http_4xx"
