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
        model: Name of a vision model at the endpoint; without one no captions are made.
        prompt: Text sent with each image.
        image_size: Longest side of the sent image in pixels; most endpoints charge by it.
        parameters: Further fields of a request, which replace all defaults; OpenAI's newer models take
            ``max_completion_tokens`` instead of ``max_tokens``, and no ``temperature``.
        max_characters: Maximum length of an accepted caption.
        coverage: Share of the images to caption, chosen at random in parts of 64 rows. Raising it requests only the
            additional captions.
        share: Share of a training's draws that use a row's made caption; the others use the list's. Changing it
            requests nothing.
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
            raise ValueError("prompt: is empty; say what captions should describe")


@dataclass(frozen=True)
class RecaptionSettings(ShardSettings):
    """Describes the endpoint, and the pace of requests.

    The key is read from the environment variable ``OPENAI_API_KEY``; without one, requests carry none.

    Attributes:
        url: Base URL, such as ``http://localhost:8000/v1``; by default that of the environment variable
            ``OPENAI_BASE_URL``.
        workers: Processes that send requests, each at the pace below; 0 sends them from this process.
        concurrency: Concurrent requests of a worker.
        per_minute: Requests per minute of a worker; 0 sets no limit.
        timeout_s: Seconds to wait for an answer.
        retries: Retries after a timeout, a failed connection, a 429 or a 5xx status; with exponential backoff and
            jitter, or ``Retry-After`` up to 10 minutes.
        budget: Images that one run may send, in parts of 64. The run then stops, and the next one continues. 0 sets no
            limit.
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
            raise ValueError("url: contains a user name or password; put the key into OPENAI_API_KEY")

    def cost(self, prompt_tokens: float, answer_tokens: float) -> float:
        """Returns what tokens cost, 0 without prices."""
        return (prompt_tokens * self.prompt_price + answer_tokens * self.answer_price) / 1e6
