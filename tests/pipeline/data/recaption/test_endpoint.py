"""One endpoint over real HTTP: what it is sent, what becomes of its answers, and of its faults."""

import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from starlette.responses import JSONResponse, PlainTextResponse, Response

from pipeline.data.recaption import endpoint as module
from pipeline.data.recaption.endpoint import FAULTS_IN_A_ROW, CaptionAnswer, Endpoint, judge_caption, read_completion
from pipeline.data.recaption.recipe import RecaptionRecipe, RecaptionSettings
from pipeline.errors import Unreachable, UserError
from pipeline.ledger import REASONS
from tests.pipeline.data.bench import picture
from tests.vision import KEY, Vision, caption_of, completion, serving


@pytest.fixture
def vision() -> Iterator[Vision]:
    with serving() as vision:
        yield vision


def jpeg(seed: int = 1) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(picture(seed))).save(out, "JPEG")
    return out.getvalue()


def open_endpoint(vision: Vision, recipe: dict[str, Any] | None = None, **settings: Any) -> Endpoint:
    given = RecaptionSettings(**{"url": vision.url, "retries": 0, **settings})
    return Endpoint(RecaptionRecipe(**{"model": "eye", **(recipe or {})}), given, {"OPENAI_API_KEY": KEY})


def test_a_request_holds_model_prompt_image_parameters_and_key(vision: Vision) -> None:
    recipe = {"prompt": "What is it?", "parameters": {"max_completion_tokens": 50, "seed": 1}}
    answer = open_endpoint(vision, recipe).ask(jpeg())
    assert answer == CaptionAnswer(caption_of(jpeg(), "What is it?", "eye"), None, 100, 7)
    [request], [headers] = vision.requests, vision.headers
    assert {name: value for name, value in request.items() if name != "messages"} == {
        "model": "eye",
        "max_completion_tokens": 50,
        "seed": 1,
    }
    assert headers["authorization"] == f"Bearer {KEY}"


def test_address_and_key_come_from_the_environment_where_no_setting_names_them(vision: Vision) -> None:
    asked = Endpoint(RecaptionRecipe("eye"), RecaptionSettings(), {"OPENAI_BASE_URL": f"{vision.url}/"}).ask(jpeg())
    assert asked.caption
    assert "authorization" not in vision.headers[0]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "no endpoint is named; set run.recaption.url, or OPENAI_BASE_URL"),
        ("localhost:8000", "is not of the form https://host/v1"),
        ("ftp://host/v1", "is not of the form https://host/v1"),
        ("http://me:secret@host/v1", "is not of the form https://host/v1, without a password"),
    ],
)
def test_an_address_that_is_none_is_named_without_what_it_holds(url: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Endpoint(RecaptionRecipe("eye"), RecaptionSettings(), {"OPENAI_BASE_URL": url})
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" A red\n heart. ", None),
        ("Sorry sight of a wreck", None),
        ("\U0001f469\u200d\U0001f52c in a lab", None),  # a joined emoji
        ("赤いハート", None),
        (None, "empty_answer"),
        ("", "empty_answer"),
        (" \n", "empty_answer"),
        (["a", "b"], "not_text"),
        ("42 !", "not_text"),
        ("a red \x00 heart", "not_text"),
        ("a red \ud800 heart", "not_text"),
        (f"a red {chr(0xFFFD)} heart", "not_text"),
        ("I'm sorry, I can't help with that.", "refused"),
        ("I\u2019m unable to describe people.", "refused"),
        ("Unfortunately, this is not possible.", "refused"),
        ("As an AI model I have no eyes.", "refused"),
        ("x" * 41, "answer_too_long"),
    ],
)
def test_answers_are_judged(text: Any, reason: str | None) -> None:
    answer = judge_caption(text, 40)
    assert answer.reason == reason
    assert answer.caption == (None if reason else " ".join(text.split()))
    assert reason is None or reason in REASONS


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>", "malformed_answer"),
        (b"[" * 100_000, "malformed_answer"),
        (b"[]", "malformed_answer"),
        (b'{"choices": []}', "malformed_answer"),
        (b'{"choices": [{"message": "a heart"}]}', "malformed_answer"),
        (b"\xff\xfe\x00", "malformed_answer"),
        (json.dumps(completion("A red heart and", "length")).encode(), "answer_too_long"),
        (json.dumps(completion("", "content_filter")).encode(), "refused"),
        (json.dumps(completion(None, refusal="I will not.")).encode(), "refused"),
    ],
)
def test_bodies_that_hold_no_caption_have_a_reason(body: bytes, reason: str) -> None:
    answer = read_completion(body, 100)
    assert (answer.caption, answer.reason) == (None, reason)


@pytest.mark.parametrize("usage", [None, 7, {"prompt_tokens": -1}, {"prompt_tokens": "many"}, {"prompt_tokens": 1e99}])
def test_tokens_that_are_no_numbers_count_as_none(usage: Any) -> None:
    body = json.dumps(completion("A heart.") | {"usage": usage}).encode()
    assert read_completion(body, 100) == CaptionAnswer("A heart.", None)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (Response(status_code=500), "http_5xx"),
        (Response(status_code=429), "rate_limited"),
        (PlainTextResponse("this image", status_code=400), "http_4xx"),
        (Response(status_code=307, headers={"Location": "http://127.0.0.1:9/"}), "http_4xx"),
        (PlainTextResponse("x" * ((1 << 20) + 1)), "malformed_answer"),
    ],
)
def test_a_status_costs_a_row_its_caption_alone(vision: Vision, response: Response, reason: str) -> None:
    vision.answer = lambda image, before: response if image == jpeg(1) else None
    endpoint = open_endpoint(vision)
    assert endpoint.ask(jpeg(1)) == CaptionAnswer(None, reason)
    assert endpoint.ask(jpeg(2)).caption


def test_a_busy_server_is_asked_again_when_it_says(vision: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    faults = [Response(status_code=429, headers={"Retry-After": "7"}), Response(status_code=503)]
    vision.answer = lambda image, before: faults[before] if before < len(faults) else None
    assert open_endpoint(vision, retries=2).ask(jpeg()).caption
    assert vision.images[jpeg()] == 3
    assert 7 in slept


def test_a_server_that_hangs_is_left(vision: Vision) -> None:
    def hang(image: bytes, before: int) -> None:
        time.sleep(1)

    vision.answer = hang
    assert open_endpoint(vision, timeout_s=0.1).ask(jpeg()) == CaptionAnswer(None, "timeout")


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_no_row_can_help_ends_the_run_and_shows_no_key(vision: Vision, status: int) -> None:
    vision.answer = lambda image, before: JSONResponse({"error": f"wrong key {KEY}"}, status)
    with pytest.raises(UserError, match=f"refuses requests with status {status}") as caught:
        open_endpoint(vision).ask(jpeg())
    assert KEY not in str(caught.value)


def test_a_server_that_is_down_ends_the_run_and_one_that_recovers_does_not(vision: Vision) -> None:
    down = set(range(FAULTS_IN_A_ROW - 1))
    count = iter(range(10**6))
    vision.answer = lambda image, before: Response(status_code=500) if next(count) in down else None
    endpoint = open_endpoint(vision)
    answers = [endpoint.ask(jpeg()) for _ in range(FAULTS_IN_A_ROW)]
    assert [answer.reason for answer in answers] == [*["http_5xx"] * (FAULTS_IN_A_ROW - 1), None]
    down |= set(range(1000))
    for _ in range(FAULTS_IN_A_ROW - 1):
        endpoint.ask(jpeg())
    with pytest.raises(Unreachable, match=r"20 requests to 127\.0\.0\.1:[0-9]+ failed in a row"):
        endpoint.ask(jpeg())


def test_a_first_request_that_fails_says_why(vision: Vision) -> None:
    open_endpoint(vision).check(jpeg())
    vision.answer = lambda image, before: PlainTextResponse("eye takes no images\x1b[2J", 400)
    with pytest.raises(UserError, match=r"status 400: eye takes no images\\x1b\[2J; see recaption\.model"):
        open_endpoint(vision).check(jpeg())
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9 does not answer \(unreachable\)"):
        Endpoint(RecaptionRecipe("eye"), RecaptionSettings(url="http://127.0.0.1:9/v1", retries=0)).check(jpeg())


def test_requests_wait_for_their_turn(vision: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of the test's own: 30 a minute are one each two seconds, whatever thread asks."""
    now, waits = [100.0], list[float]()
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    endpoint = open_endpoint(vision, per_minute=30)
    for _ in range(3):
        endpoint._wait_for_turn(waits.append)
    now[0] += 60
    endpoint._wait_for_turn(waits.append)
    assert waits == [0, 2, 4, 0]


def test_connections_are_as_many_as_threads_and_are_used_again(vision: Vision) -> None:
    endpoint = open_endpoint(vision, concurrency=4)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(endpoint.ask, [jpeg(i) for i in range(40)]))
    assert [answer.caption for answer in answers] == [
        caption_of(jpeg(i), RecaptionRecipe().prompt, "eye") for i in range(40)
    ]
    assert vision.most <= 4
