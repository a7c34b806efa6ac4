"""Follows a training from outside: its progress while workers elsewhere run, and its results so far."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager

from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.stages import Context
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.store.records import put_blob
from pipeline.training.checkpoints import open_checkpoints
from pipeline.training.trackers import Trackers

log = logging.getLogger("unclip")


@contextmanager
def following(stage: str, total: int, newest: Callable[[], int], every_s: float = 5.0) -> Iterator[None]:
    """Shows the progress of workers elsewhere, in samples, for as long as the context lasts.

    ``newest`` returns the samples of their latest checkpoint; it is called every ``every_s`` seconds.
    """

    def follow(stop: threading.Event) -> None:
        with Progress(stage, total, "samples", start=newest()) as progress:
            while not stop.wait(every_s):
                if (now := newest()) != progress.done:
                    progress.advance(now - progress.done)
            progress.advance(newest() - progress.done)

    with _meanwhile(follow, f"{stage}: its progress cannot be shown any more"):
        yield


@contextmanager
def showing(ctx: Context, every_s: float = 5.0) -> Iterator[None]:
    """Calls ``ctx.show`` with ``so_far(ctx)`` at each new checkpoint, for as long as the context lasts.

    Trackers get the same, and at the end the artefact. Where there is no ``ctx.show``, nobody follows.
    """
    if (show := ctx.show) is None:
        yield
        return

    def follow(stop: threading.Event) -> None:
        shown: Mapping[str, str] = {}
        failed = False
        while not stop.wait(every_s):
            try:
                running = so_far(ctx)
                if running is not None and running.blobs != shown:
                    show(running)
                    trackers.tell(running)
                    shown = running.blobs
                failed = False
            except Exception as e:  # such as a store that is away for a minute, which the training outlives
                if not failed:
                    log.warning("%s: not shown in report and trackers for now: %s", ctx.stage, e)
                failed = True

    with closing(Trackers(ctx)) as trackers:
        with _meanwhile(follow, f"{ctx.stage}: no longer shown in report and trackers while it runs"):
            yield
        if made := load_artifact(ctx.store, ctx.stage, ctx.key):
            trackers.tell(made)


def so_far(ctx: Context) -> Artifact | None:
    """Returns the artefact that a training would publish at its newest checkpoint, without the model.

    It is not in the store. None before the first checkpoint. Metrics have "samples_seen".
    """
    found = open_checkpoints(ctx, begin=False).journal(ctx.recipe.whole_samples)
    if found is None:
        return None
    samples, journal = found
    blobs = {"metrics.jsonl": put_blob(ctx.store, journal.text()), **journal.previews()}
    return ctx.publishable(blobs=blobs, ledger=Ledger(), metrics=journal.latest() | {"samples_seen": samples})


@contextmanager
def _meanwhile(work: Callable[[threading.Event], None], failed: str) -> Iterator[None]:
    """Runs ``work`` in a thread until the event is set, at the end of the context.

    An error of it is a warning: following must not end a training.
    """
    stop = threading.Event()

    def guarded() -> None:
        try:
            work(stop)
        except Exception as e:
            log.warning("%s: %s", failed, e)

    thread = threading.Thread(target=guarded, daemon=True, name="follow")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
