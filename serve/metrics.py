"""Figures of the server: as Prometheus reads them at ``/metrics``, and through Ray's own exporter. No captions."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray.util import metrics as ray_metrics

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64)
FIGURES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "num_queue_reqs": ("gauge", "Requests that wait.", ()),
    "num_running_reqs": ("gauge", "Requests that are being drawn.", ()),
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
    """Notes figures by their names, without the prefix ``unclip_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.figures: dict[str, tuple[Any, Any]] = {}
        for name, (kind, about, labels) in FIGURES.items():
            full, bounds = f"unclip_{name}", SIZES if name == "batch_size" else SECONDS
            more = {"buckets": bounds} if kind == "histogram" else {}
            made = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}[kind]
            ours = made(full, about, labels, registry=self.registry, **more)
            if kind == "histogram":
                theirs: Any = ray_metrics.Histogram(full, about, list(bounds), labels)
            else:
                theirs = (ray_metrics.Gauge if kind == "gauge" else ray_metrics.Counter)(full, about, labels)
            self.figures[name] = ours, theirs

    def __call__(self, name: str, value: float = 1, **labels: str) -> None:
        """Sets a gauge, adds to a counter, or adds an observation to a histogram."""
        kind = FIGURES[name][0]
        ours, theirs = self.figures[name]
        ours = ours.labels(**labels) if labels else ours
        if kind == "gauge":
            ours.set(value)
            theirs.set(value, labels)
        elif kind == "counter":
            ours.inc(value)
            theirs.inc(value, labels)
        else:
            ours.observe(value)
            theirs.observe(value, labels)

    def text(self) -> bytes:
        """Returns all figures in Prometheus' text format."""
        return generate_latest(self.registry)
