"""The bundle to serve, as each process that draws finds and opens it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field

from models.cascade import UnCLIP
from models.sampling_config import UPSAMPLERS
from pipeline.data.embeddings.scores import Head, load_heads
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.parse import ContentFile
from pipeline.release.pointer import read_releases
from pipeline.release.signing import find_release
from pipeline.sampling.drawing import open_bundle
from pipeline.store import open_store
from pipeline.store.records import materialise


@dataclass(unsafe_hash=True)  # a key of caches; ``moves`` alone changes, which is not compared
class ServedBundle:
    """Names a bundle: in a store by its key or as the release of a project, or a folder.

    Attributes:
        name: Model name that clients use.
        store: URL of the store, or "" for a folder.
        key: Key of the bundle, or what identifies the folder; "" for the release of ``project``.
        project: Project whose release is followed.
        folder: Folder of the bundle, if it is not in a store.
        keys: Public keys of which one must have signed the release; without any, signatures are not checked.
        moves: Number of moves of the release that this process has seen; with ``keys`` an older state is refused.
    """

    name: str
    store: str = ""
    key: str = ""
    project: str = ""
    folder: str = ""
    keys: tuple[str, ...] = ()
    moves: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        self.keys = tuple(self.keys)  # which JSON makes a list

    def current(self) -> str:
        """Returns the key of the bundle to serve now.

        Raises UserError for a project without a release, and Untrusted for one that none of ``keys`` has signed so.
        """
        if self.key:
            return self.key
        store = open_store(self.store)
        releases = read_releases(store, self.project)
        if releases.current is None:
            raise UserError(f"{self.project} has no release in {self.store}; make one with unclip release promote")
        if self.keys:
            find_release(store, self.project, releases, self.keys, self.moves)
        self.moves = len(releases.moves)
        return releases.current.bundle

    def open(self, key: str, device: str) -> UnCLIP:
        """Loads the bundle of a key. Raises UserError where it is not in the store, CorruptObject if it is damaged."""
        if self.folder:
            return open_bundle(self.folder, device)
        store = open_store(self.store)
        artifact: Artifact | None
        if self.keys:
            artifact = find_release(store, self.project, read_releases(store, self.project), self.keys, self.moves)
            if artifact.key != key:
                raise UserError(f"the release moved while its bundle {key[:12]} was being opened; try again")
        else:
            artifact = load_artifact(store, "bundle", key)
        if artifact is None:
            raise UserError(f"bundle {key[:12]} is no longer in {store.url}; run its configuration again")
        with tempfile.TemporaryDirectory() as folder:
            materialise(store, artifact.blobs, folder)
            return open_bundle(folder, device)


def read_head(path: str, embed_dim: int) -> Head:
    """Returns the linear head in a file, for embeddings of ``embed_dim``. Raises UserError as ``load_heads`` does."""
    return load_heads(open_store("."), {"serve": ContentFile.at(path, "serve")}, embed_dim)["serve"]


def sides(unclip: UnCLIP) -> list[int]:
    """Returns the sides of the images that a bundle makes, in pixels, the smallest first."""
    models = (unclip.decoder, *(getattr(unclip, name) for name in UPSAMPLERS))
    return [model.config.image_size for model in models if model is not None]
