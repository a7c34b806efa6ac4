"""The recipe and the settings of made captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.settings import ShardSettings, Workers

PART = 64  # rows of a shard that are asked for together: a crash loses the answers of parts that are not finished
# Text models read 75 tokens, about 50 words (docs/captions.md).
PROMPT = (
    "Describe this image in one sentence of at most 50 words, for somebody who wants to paint it: subjects, their "
    "number, colours and positions, background and style. Begin with the subject, and write nothing else."
)
OWN_FIELDS = ("model", "messages", "stream", "n")  # of a request, which parameters must leave alone
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class RecaptionRecipe:
    """Says who makes captions, of what, and how often a training takes them.

    Attributes:
        model: Name of a vision model, as the endpoint knows it; without one no captions are made.
        prompt: Text of a request, beside the image.
        image_size: Longest side of the image that is sent, in pixels; most endpoints charge by it.
        parameters: Further fields of a request. Yours replace all of the default's; newer models of OpenAI take
            ``max_completion_tokens`` in place of ``max_tokens``, and no ``temperature``.
        max_characters: Characters of the longest caption that is taken.
        coverage: Share of the images that get a caption, drawn in parts of 64 rows. A larger share asks for what it
            adds.
        share: Share of the draws in which a training takes the made caption of a row; the others take one of the
            list's. Another share asks for nothing.
    """

    model: str = ""
    prompt: str = PROMPT
    image_size: Annotated[int, Field(ge=32, le=4096)] = 512
    parameters: dict[str, bool | int | float | str] = field(
        default_factory=lambda: {"max_tokens": 200, "temperature": 0}
    )
    max_characters: PositiveInt = 600
    coverage: Share = 1.0
    share: Share = 0.95

    def __post_init__(self) -> None:
        for name in OWN_FIELDS:
            if name in self.parameters:
                raise ValueError(f"parameters: {name} is set by this stage; leave it out")
        if self.model and not self.prompt.strip():
            raise ValueError("prompt: is empty; say what a caption is to describe")


@dataclass(frozen=True)
class RecaptionSettings(ShardSettings):
    """Describes the endpoint, and the pace of requests.

    The key is read from the environment variable ``OPENAI_API_KEY``; without one, requests carry none.

    Attributes:
        url: Base URL, such as ``http://localhost:8000/v1``; by default that of the environment variable
            ``OPENAI_BASE_URL``.
        workers: Processes that send requests, each at the pace below; 0 sends them from this process.
        concurrency: Requests at once from a worker.
        per_minute: Requests a minute from a worker; 0 sets no limit.
        timeout_s: Seconds until an answer has to come.
        retries: Retries after a timeout, a failed connection, a 429 or a 5xx status; pauses double and are random, or
            are as long as the server asks for, up to 10 minutes.
        budget: Images that one run asks for, in parts of 64. A run that needs more stops there, and the next one goes
            on. 0 sets no limit.
        prompt_price: Price of a million tokens of requests, in the currency of ``run.prices``.
        answer_price: Price of a million tokens of answers, likewise.
    """

    url: str = ""
    workers: Workers = 1
    concurrency: PositiveInt = 32
    per_minute: NonNegativeInt = 0
    timeout_s: PositiveFloat = 60.0
    retries: NonNegativeInt = 4
    budget: NonNegativeInt = 0
    prompt_price: NonNegativeFloat = 0.0
    answer_price: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        if "@" in self.url:
            raise ValueError("url: names a user or a password; put the key into OPENAI_API_KEY")

    def cost(self, prompt_tokens: float, answer_tokens: float) -> float:
        """Returns what tokens cost, 0 without prices."""
        return (prompt_tokens * self.prompt_price + answer_tokens * self.answer_price) / 1e6
