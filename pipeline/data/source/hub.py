"""Reads datasets of the Hugging Face Hub: their files are fetched by the Hub's client into its cache, at one commit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.source.annotations import AnnotationFile
from pipeline.data.source.columns import IMAGES, SUFFIXES
from pipeline.data.source.folders import SPLITS, ImageFolder
from pipeline.data.source.parsers.sidecars import SIDECARS
from pipeline.data.source.reader import ListReader
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.remote import MOST_BYTES
from pipeline.data.source.source import METADATA, FileSource, ListRow, Source
from pipeline.data.source.tables import TableFiles
from pipeline.data.source.tars import TarFiles
from pipeline.errors import UserError
from pipeline.progress import counted, say_once
from pipeline.store.parallel import ordered_map

if TYPE_CHECKING:
    from huggingface_hub.utils import HfUri

THREADS = 8  # files that are fetched at once
COMMIT = re.compile(r"[0-9a-f]{40}")
FOLDER_FILES = (*IMAGES, *METADATA, *(f".{suffix}" for suffix in SIDECARS))
# Endings of the files that hold a data set, the preferred one first, and what reads them.
KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...], type[FileSource]], ...] = (
    (METADATA, FOLDER_FILES, ImageFolder),
    ((".parquet",), (".parquet",), TableFiles),
    ((".tar",), (".tar",), TarFiles),
    (IMAGES, FOLDER_FILES, ImageFolder),
    (SUFFIXES, SUFFIXES, TableFiles),
    ((".json",), (".json",), AnnotationFile),
)


class HubDataset(Source):
    """A dataset, or a folder or file of it: ``hf://datasets/OWNER/NAME@REVISION/PATH``; the last two may lack."""

    prefixes = ("hf://",)

    @property
    def own(self) -> str:
        """Returns the folder of the cache to which the names of its files link."""
        return str(_cached(_place(self.path).id))

    def pinned(self) -> str:
        uri = _place(self.path)
        return replace(uri, revision=_commit(self.path), _raw=None).to_uri()

    def fingerprint(self) -> Any:
        return ["hub", self.pinned()]

    def rows(self, recipe: SourceRecipe, reader: ListReader) -> Iterator[ListRow]:
        """Yields the rows of its files; a file or folder that is called as a split has rows of it."""
        kind, root, names = _fetched(self.pinned())
        inside = replace(recipe, roots=(*recipe.roots, self.own))
        if kind is ImageFolder:
            yield from ImageFolder(str(root / _place(self.path).path_in_repo)).rows(inside, reader)
            return
        splits = {name: _split(name) for name in names}
        whole = {"validation", "test"} <= {*splits.values()}  # else a hash splits what is called train
        for name in names:
            split = splits[name] if splits[name] != "train" or whole else ""
            for row in kind(str(root / name)).rows(inside, reader):
                yield replace(row, split=row.split or split)


@contextmanager
def _asking(path: str) -> Iterator[None]:
    """Makes one sentence of what the Hub's client raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # of whatever library it goes through
        said = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"source {path}: cannot be fetched from the Hugging Face Hub ({said}); check its name, the network, and "
            "HF_TOKEN if it is private or has terms to accept"
        ) from None


def _place(path: str) -> HfUri:
    from huggingface_hub import parse_hf_uri

    try:
        found = parse_hf_uri(path)
    except ValueError as e:
        raise UserError(f"source {path}: {str(e).splitlines()[0].strip()} Write hf://datasets/OWNER/NAME") from None
    if found.type != "dataset":
        raise UserError(f"source {path}: a {found.type} of the Hub, not a dataset; write hf://datasets/OWNER/NAME")
    return found


def _cached(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / f"datasets--{repository.replace('/', '--')}"


@cache
def _commit(path: str) -> str:
    """Returns the commit that a path names now."""
    from huggingface_hub import HfApi

    uri = _place(path)
    if uri.revision and COMMIT.fullmatch(uri.revision):
        return uri.revision
    with _asking(path):
        found = str(HfApi().resolve_revision(uri.id, repo_type="dataset", revision=uri.revision).resolved)
    if not COMMIT.fullmatch(found):  # it becomes a part of a path
        raise UserError(f"source {path}: the Hub names {found[:100]!r} as the commit; check HF_ENDPOINT")
    say_once(f"{path} is at commit {found}; write {path.partition('@')[0]}@{found} to pin it")
    return found


@cache
def _fetched(path: str) -> tuple[type[FileSource], Path, tuple[str, ...]]:
    """Fetches what is read of a dataset at a commit; returns what reads it, a folder, and the files below that."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.hf_api import RepoFile

    uri = _place(path)
    at: dict[str, Any] = {"repo_type": "dataset", "revision": uri.revision}
    with _asking(path):
        tree = HfApi().list_repo_tree(uri.id, recursive=True, **at)
        sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile) and _below(file.path, uri)}
        kind, names = _chosen(path, uri.id, sorted(sizes))
        left = [name for name in names if not isinstance(try_to_load_from_cache(uri.id, name, **at), str)]
        size = sum(sizes[name] for name in left)
        room = shutil.disk_usage(next(folder for folder in _cached(uri.id).parents if folder.is_dir())).free
        if size > min(MOST_BYTES, room):
            raise UserError(
                f"source {path}: {size:,} bytes are to be fetched, with {room:,} free on the disk, and {MOST_BYTES:,} "
                f"at most are fetched unasked; type: hf download {uri.id} --repo-type dataset --revision {uri.revision}"
            )
        if left:
            say_once(f"fetching {counted(len(left), 'file')} of {path}: {size:,} bytes")
        for _ in ordered_map(partial(hf_hub_download, uri.id, **at), left, THREADS):
            pass
    return kind, _cached(uri.id) / "snapshots" / str(uri.revision), tuple(names)


def _below(name: str, uri: HfUri) -> bool:
    """Returns whether a file belongs to what a path names; hidden ones do not, nor names that lead elsewhere."""
    place = uri.path_in_repo
    return (not place or name == place or name.startswith(f"{place}/")) and not re.search(r"(^|/)\.", name)


def _chosen(path: str, repository: str, names: Sequence[str]) -> tuple[type[FileSource], list[str]]:
    """Returns which files of a dataset are read, and what reads them."""
    for endings, read, kind in KINDS:
        if any(name.lower().endswith(endings) for name in names):
            return kind, [name for name in names if name.lower().endswith(read)]
    raise UserError(
        f"source {path}: none of its {counted(len(names), 'file')} has a supported format; if the Hub has converted "
        f"it to Parquet, write hf://datasets/{repository}@refs/convert/parquet"
    )


def _split(name: str) -> str:
    """Returns the split that a file is called after, as in data/train-00000-of-00002.parquet or test/0.parquet."""
    *folders, file = name.lower().split("/")
    words = [re.split(r"[-_.]", file)[0], *reversed(folders)]
    return next((SPLITS[word] for word in words if word in SPLITS), "")
