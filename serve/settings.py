"""Settings of ``unclip serve``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

MOST_IMAGES = 10  # of a request, as OpenAI has it
CLOSING_S = 2.0  # at the end of a process, for the last bytes of answers
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIMITS = {"requests": 60.0, "megapixels": 120.0, "megabytes": 600.0}  # of a token in a minute, where others are let in


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server: its address, its replicas, and its limits.

    Attributes:
        host: Address to listen on; any but loopback needs tokens.
        port: Port to listen on; 0 chooses a free one and prints it.
        replicas: Maximum number of copies of the bundle that draw at once; 0 is one per GPU, at least one. A single one
            is a thread of this process, several are Ray processes.
        idle_replicas: Replicas kept when idle; 0 frees the memory, and the next request waits for a start.
        idle_s: Seconds without work after which surplus replicas end.
        device: ``auto`` is a GPU if there is one.
        cpus: Cores of a replica without a GPU; 0 is its share of the machine.
        batch: Maximum images drawn at once, from requests with equal settings.
        queue: Maximum waiting images; further requests get 429 with Retry-After.
        deadline_s: Seconds after which an unfinished request gets an error.
        watchdog_s: Seconds without a step after which drawing counts as stuck and its replica is replaced; at least ten
            times the warm-up's slowest step per image of a batch.
        drain_s: Seconds for answering accepted requests after SIGTERM.
        results_mb: Megabytes of finished images kept for the same request, and under their URLs.
        requests_per_minute: Requests per token; 0 sets no limit. By default 60 if ``host`` is not loopback, otherwise
            0.
        megapixels_per_minute: Megapixels drawn per token, by default 120 or 0. An image with k times the bundle's own
            steps counts k times.
        megabytes_per_minute: Megabytes received per token; by default 600 or 0.
        follow_s: Seconds between checks of the release, if one is served.
        log_prompts: Captions of requests are logged.
        prompt_head: Linear head of CLIP's text embeddings (a safetensors file, as for ``embeddings.heads``).
        most_prompt: Score above which a prompt is refused.
        image_head: Linear head of CLIP's image embeddings.
        most_image: Score above which an image is withheld; with either head no smaller images come before it.
        licenses: Licences of the training images that the studio may show, spelled as in the list; by default all.
        tokens: File of lines NAME TOKEN; by default the variable UNCLIP_TOKENS. A request without one of these tokens
            is refused.
        origins: Other origins whose pages may call the API, such as https://example.org.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: NonNegativeInt = 0
    idle_replicas: NonNegativeInt = 1
    idle_s: PositiveFloat = 600.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus: NonNegativeInt = 0
    batch: PositiveInt = 4
    queue: PositiveInt = 64
    deadline_s: PositiveFloat = 600.0
    watchdog_s: PositiveFloat = 60.0
    drain_s: PositiveFloat = 60.0
    results_mb: PositiveInt = 256
    requests_per_minute: NonNegativeInt | None = None
    megapixels_per_minute: NonNegativeFloat | None = None
    megabytes_per_minute: NonNegativeFloat | None = None
    follow_s: PositiveFloat = 10.0
    log_prompts: bool = False
    prompt_head: str = ""
    most_prompt: float = 0.5
    image_head: str = ""
    most_image: float = 0.5
    licenses: tuple[str, ...] = ()
    tokens: str = ""
    origins: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        """Returns whether only this machine reaches the server."""
        return self.host in LOOPBACK

    def limits(self) -> dict[str, float]:
        """Returns what a token may use in a minute, by what; 0 sets no limit."""
        asked = {
            "requests": self.requests_per_minute,
            "megapixels": self.megapixels_per_minute,
            "megabytes": self.megabytes_per_minute,
        }
        return {name: (0 if self.local else LIMITS[name]) if most is None else most for name, most in asked.items()}

    def __post_init__(self) -> None:
        if self.replicas and self.idle_replicas > self.replicas:
            raise ValueError(f"idle_replicas: {self.idle_replicas} are more than replicas, {self.replicas}")
