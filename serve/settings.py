"""How a bundle is served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

MOST_IMAGES = 10  # of a request, as OpenAI has it


@dataclass(frozen=True)
class ServeSettings:
    """Says where a bundle is served, on how many processes, and how much a client may ask for.

    Attributes:
        host: The address to listen on; any but loopback needs tokens.
        port: The port to listen on; 0 takes a free one, which is printed.
        replicas: Processes that draw, at most; each holds the bundle. 0 is one a GPU, or two that share the cores.
        idle_replicas: Processes that stay when nobody draws; 0 frees the memory, and the next request waits for one.
        idle_s: Seconds without work after which a process ends that need not stay.
        device: ``auto`` is a GPU if Ray has one.
        cpus: Cores of a process that draws without a GPU; 0 is its share of its machine.
        batch: Images that are drawn at once, of requests with equal settings.
        wait_ms: Milliseconds that a request waits for others like it.
        queue: Images that may wait; a request beyond is told to come back.
        results_mb: Megabytes of finished images kept for the same request, and under their URLs.
        requests_per_minute: Of a token; 0 sets no limit.
        megapixels_per_minute: Of a token, drawn; 0 sets no limit.
        megabytes_per_minute: Of a token, sent to the server; 0 sets no limit.
        follow_s: Seconds between two looks at the release, if one is served.
        log_prompts: Write the captions of requests into the log.
        prompt_head: A linear head of CLIP's text embeddings (a safetensors file, as for ``embeddings.heads``).
        most_prompt: Prompts with a score above it are refused.
        image_head: A linear head of CLIP's image embeddings.
        most_image: Images with a score above it are not handed out; with either head no smaller ones come first.
        licenses: Licences of the training images that the studio may show, as the list spells them; all if none.
        tokens: A file of lines NAME TOKEN; by default the environment's UNCLIP_TOKENS. A request without one of these
            tokens is refused.
        origins: Web pages of other addresses that may call the API, such as https://example.org.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: NonNegativeInt = 0
    idle_replicas: NonNegativeInt = 1
    idle_s: PositiveFloat = 600.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus: NonNegativeInt = 0
    batch: PositiveInt = 4
    wait_ms: NonNegativeFloat = 20.0
    queue: PositiveInt = 64
    results_mb: PositiveInt = 256
    requests_per_minute: NonNegativeInt = 0
    megapixels_per_minute: NonNegativeFloat = 0.0
    megabytes_per_minute: NonNegativeFloat = 0.0
    follow_s: PositiveFloat = 10.0
    log_prompts: bool = False
    prompt_head: str = ""
    most_prompt: float = 0.5
    image_head: str = ""
    most_image: float = 0.5
    licenses: tuple[str, ...] = ()
    tokens: str = ""
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.replicas and self.idle_replicas > self.replicas:
            raise ValueError(f"idle_replicas: {self.idle_replicas} are more than replicas, {self.replicas}")
