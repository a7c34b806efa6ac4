"""Metrics of the server, as Prometheus reads them at ``/metrics``. No captions: monitoring sees no prompts."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Upper bounds of the histograms' buckets: a cached image takes milliseconds, one of 1024 px on a CPU minutes.
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64)
KINDS: dict[str, tuple[Any, str]] = {
    "gauge": (Gauge, "set"), "counter": (Counter, "inc"), "histogram": (Histogram, "observe")
}  # fmt: skip
FIGURES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "num_queue_reqs": ("gauge", "Requests that wait.", ()),
    "num_running_reqs": ("gauge", "Requests being drawn.", ()),
    "num_replicas": ("gauge", "Live replicas.", ()),
    "requests_total": ("counter", "Requests answered.", ("endpoint", "status")),
    "images_total": ("counter", "Images drawn.", ("kind",)),
    "cached_images_total": ("counter", "Images that were kept from an earlier request.", ()),
    "refusals_total": ("counter", "Requests that were refused, by the error's code.", ("code",)),
    "retries_total": ("counter", "Batches drawn again because their process was gone.", ()),
    "e2e_request_latency_seconds": ("histogram", "From the request to the end of its answer.", ("endpoint",)),
    "queue_time_seconds": ("histogram", "From the request to the beginning of its batch.", ()),
    "stage_latency_seconds": ("histogram", "Of one model for one batch.", ("stage",)),
    "batch_size": ("histogram", "Images drawn at once.", ()),
}


class Metrics:
    """Records metrics by their names, without the prefix ``unclip_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.figures: dict[str, Any] = {}
        for name, (kind, about, labels) in FIGURES.items():
            full, bounds = f"unclip_{name}", SIZES if name == "batch_size" else SECONDS
            more = {"buckets": bounds} if kind == "histogram" else {}
            self.figures[name] = KINDS[kind][0](full, about, labels, registry=self.registry, **more)

    def __call__(self, name: str, value: float = 1, **labels: str) -> None:
        """Sets a gauge, adds to a counter, or adds an observation to a histogram."""
        figure = self.figures[name].labels(**labels) if labels else self.figures[name]
        getattr(figure, KINDS[FIGURES[name][0]][1])(value)

    def text(self) -> bytes:
        """Returns all figures in Prometheus' text format."""
        return generate_latest(self.registry)
