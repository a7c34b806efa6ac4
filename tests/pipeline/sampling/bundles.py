"""A published bundle."""

from pathlib import Path

from pipeline.graph.artifacts import Artifact, publish_artifact
from pipeline.ledger import Ledger
from pipeline.store import Store, open_store
from pipeline.store.records import put_blob
from tests.models.small_models import make


def publish_bundle(folder: Path) -> tuple[Store, Artifact]:
    """A bundle of random weights in a store of its own."""
    make().save(folder / "bundle")
    store = open_store(str(folder / "store"))
    files = [path for path in (folder / "bundle").rglob("*") if path.is_file()]
    blobs = {str(path.relative_to(folder / "bundle")): put_blob(store, path) for path in files}
    return store, publish_artifact(store, Artifact("bundle", "b" * 64, {}, {}, Ledger(), blobs), 0.0)
