"""Finds the bundle that ``--from`` names, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.archives import DEMO, archived_bundle, cached_folders, demo_address, is_archive
from jobs.command_line import PLACES
from jobs.project import load_as_run, open_as_run
from pipeline.data.source.lists import ON_HUB
from pipeline.errors import UserError
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.ledger import Ledger
from pipeline.local import PathPolicy, open_local, read_local
from pipeline.pages import page
from pipeline.release.pointer import read_releases
from pipeline.release.signing import files_of, find_release
from pipeline.store import Store, local_folder, open_store
from pipeline.store.names import is_digest, is_part
from pipeline.store.records import digest, materialise, put_blob

if TYPE_CHECKING:
    from pipeline.sampling.nearest import TrainingImages

RELEASE = "release:"


@dataclass(frozen=True)
class Bundle:
    """A bundle of a store, or of a folder as it is if there is no ``store``.

    Attributes:
        output: Default folder for what is drawn with it.
        key: Key of its artefact, or of the files in its folder.
        blobs: Files of the bundle: sha256 by name.
        store: Store that holds the files.
        place: Folder of its own, where it has one already.
        files: Digest of the signed files, for a release that must be signed; "" for any other bundle.
    """

    output: Path
    key: str
    blobs: Mapping[str, str]
    store: Store | None = None
    place: Path | None = None
    files: str = ""

    @property
    def name(self) -> str:
        """Returns what short messages and files call it."""
        return self.key[:12]

    @cached_property
    def folder(self) -> Path:
        """Returns its folder on this machine, copied from the store the first time. Raises UserError."""
        if self.store is None:
            assert self.place is not None
            return self.place
        # What is there is not read again: files of a signed release lie apart from those that another list named.
        folder = self.output / "bundle" / (f"signed-{self.files[:12]}" if self.files else self.name)
        self.copy(folder)
        return folder

    def copy(self, folder: Path) -> None:
        """Writes its files from the store into a folder. Raises CorruptObject."""
        assert self.store is not None
        materialise(self.store, self.blobs, folder)

    def training(self) -> TrainingImages:
        """Returns the images that it was trained on, to search among. Raises UserError where they are not known."""
        from pipeline.sampling.nearest import NO_INDEX, find_carried, find_stored  # which import torch

        found: TrainingImages | None
        if self.store is None:
            found = find_carried(self.folder)
        else:
            artifact = load_artifact(self.store, "bundle", self.key)
            found = find_stored(self.store, artifact) if artifact else None
        if found is None:
            raise UserError(NO_INDEX)
        return found

    def stored(self) -> tuple[Store, Artifact]:
        """Returns the store that holds it and its artefact; a bundle of a folder is put into a store of the output."""
        store = self.store or open_store(str(self.output / "store"))
        if self.store is None:
            for name in self.blobs:
                put_blob(store, self.folder / name)
        return store, Artifact("bundle", self.key, {}, {}, Ledger(), self.blobs)


def find_bundle(source: str | None, overrides: Sequence[str] = ()) -> Bundle:
    """Returns the bundle at ``source``, one of PLACES; by default the newest of the runs under out/.

    ``overrides`` are a project's. Raises UserError where none is finished.
    """
    if source is None:
        return _of_output(_newest_output())
    if source.startswith(RELEASE):
        config = load_as_run(source.removeprefix(RELEASE), overrides)
        store = open_store(config.store)
        keys = config.release.keys
        artifact = find_release(store, config.project, read_releases(store, config.project), keys)
        return _stored(Path(config.run.output), store, artifact, files_of(artifact) if keys else "")
    folder = Path(source)
    if folder.suffix in (".yaml", ".yml"):
        project = open_as_run(source, overrides)
        return _stored(Path(project.config.run.output), project.store, project.made("bundle")["bundle"])
    if overrides:
        raise UserError(f"{overrides[0]}: {source} is not a project, and only projects take KEY=VALUE; leave it out")
    if source == DEMO and not folder.is_dir():
        source = demo_address()
    if is_archive(source) and not folder.is_dir():
        place, name = archived_bundle(source)
        return _of_folder(place, Path("out") / name)
    if (folder / "sampling.json").is_file():
        return _of_folder(folder, Path("out") / folder.resolve().name)
    if (folder / "model_index.json").is_file():
        raise UserError(
            f"{source}: is in diffusers' layout; unclip export {source} --to NEW makes a bundle of what unclip export "
            f"wrote; for others {page('export')} has the lines"
        )
    return _of_output(folder)


def find_cached(key: str) -> Bundle | None:
    """Returns the bundle of a key among those that were one file and are unpacked here; None where none has it."""
    found = (_of_folder(folder, Path("out") / key[:12]) for folder in cached_folders())
    return next((bundle for bundle in found if bundle.key == key), None)


def remember_bundle(output: Path, store: str, key: str, files: str = "") -> None:
    """Writes into a run's output folder where its bundle is, relative to it where the store is below it.

    ``files``: the digest of the files of a signed release; others under this key are not drawn with then.
    """
    output.mkdir(parents=True, exist_ok=True)
    if (folder := local_folder(open_store(store))) and folder.is_relative_to(output.absolute()):
        store = os.path.relpath(folder, output.absolute())
    (output / "bundle.json").write_text(json.dumps({"store": store, "bundle": key, "files": files}) + "\n")


def _newest_output() -> Path:
    files = [*Path("out").glob("bundle.json"), *Path("out").glob("*/bundle.json")]
    found = sorted(files, key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"no finished bundle under out/; run one first (unclip peek), or name with --from {PLACES}")
    return found[-1].parent


def _of_output(output: Path) -> Bundle:
    """Returns the bundle that ``remember_bundle`` wrote down; its copy in the folder, where its store has gone."""
    try:
        word = json.loads(read_local(output / "bundle.json", 1 << 16))
        url, key, files = word["store"], word["bundle"], word["files"]
        if not is_part(key) or not (files == "" or is_digest(files)):
            raise ValueError(word)
        store = open_store(url if "://" in url else str(output / url))
    except (OSError, ValueError, KeyError, TypeError):
        hub = ""
        if ON_HUB.fullmatch(str(output)) and output.parts[0] != "out" and not output.parent.exists():
            download = f"hf download {output} --local-dir {output.name}"
            hub = f"; one on the Hugging Face Hub has to be downloaded first: {download}"
        raise UserError(f"{output}: no finished bundle there; name {PLACES}{hub}") from None
    artifact = load_artifact(store, "bundle", key)
    copy = output / "bundle" / (f"signed-{files[:12]}" if files else key[:12])
    if artifact is not None and files and files != files_of(artifact):
        raise UserError(
            f"{output}: its bundle in {store.url} has other files than those that were signed; take it again"
        )
    if artifact is None and (copy / "sampling.json").is_file():
        return replace(_of_folder(copy, output), key=key)  # recipes name it so
    if artifact is None:
        raise UserError(f"{output}: its bundle is no longer in {store.url}; run its configuration again")
    return _stored(output, store, artifact, files)


def _stored(output: Path, store: Store, artifact: Artifact, files: str = "") -> Bundle:
    return Bundle(output, artifact.key, artifact.blobs, store, files=files)


def _of_folder(folder: Path, output: Path) -> Bundle:
    """Returns the bundle in a folder that may come from anybody. Raises UserError for a link that leads out of it."""
    blobs, within = {}, PathPolicy((str(folder.absolute()),))
    try:
        # A link to a folder is not followed, and not passed over either: opening it says what it is.
        for file in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
            with open_local(file, within) as opened:
                blobs[file.relative_to(folder).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror}); copy the bundle with cp -rL first") from None
    return Bundle(output, digest(blobs), blobs, place=folder)
