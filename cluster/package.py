"""Packs the code package of a job: the code, the configuration with all its values, and small files that it names.

Lists travel as they are read, not as they lie: passwords are masked, and rows that were forgotten are empty. A zip of
the same files is the same bytes, so that Ray and the store take it once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from cluster.job import PROJECT_FILE
from models.clip_weights import ClipWeights
from pipeline.config import Config, named_weights, plain_values
from pipeline.data.content import put_content
from pipeline.data.source.journal import FORGOTTEN, ListJournal, reference_marks
from pipeline.data.source.lists import read_rows, source_at
from pipeline.data.source.rows import ROWS_SUFFIX, write_rows
from pipeline.data.source.source import ListRow, Source
from pipeline.errors import UserError
from pipeline.local import PathPolicy, names_file
from pipeline.parse import ContentFile
from pipeline.store import Store

ROOT = Path(__file__).parents[1]
CODE = ("models", "pipeline", "jobs", "cluster", "serve")
# What code reads besides; nothing else that lies in these folders travels, as it may be somebody's secret.
DATA = {
    "pipeline/presets": (".yaml",),
    "pipeline/report/templates": (".html", ".css", ".svg"),
    "serve/studio": (".html", ".css", ".js"),
}
PACKAGES = "packages"  # their folder in a store
LARGEST = 100 << 20  # bytes; as much as Ray keeps of a package, for which this is its own limit too
NAMED = 5  # of the largest files, in a message


@dataclass(frozen=True)
class Package:
    """A code package.

    Attributes:
        files: Files or their contents, by name.
        weights: Files that go through the store, by their content.
        notes: Lines, one for each thing that does not travel.
    """

    files: Mapping[str, Path | bytes]
    weights: tuple[ContentFile, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each file."""
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}

    @property
    def key(self) -> str:
        """Returns the sha256 of names and contents."""
        whole = hashlib.sha256()
        for name, file in sorted(self.files.items()):
            data = file if isinstance(file, bytes) else file.read_bytes()
            whole.update(f"{name}\n{len(data)}\n".encode() + data)
        return whole.hexdigest()


def make_package(config: Config, store_url: str, output: str, journal: ListJournal, here: bool = False) -> Package:
    """Returns the package of a job.

    Args:
        config: Configuration of the job.
        store_url: URL of the store that the job writes to.
        output: Folder that its driver writes to.
        journal: Journal of the project's list; rows that it says are forgotten travel without their references.
        here: The job runs on this machine, and lists stay where they are.

    Raises UserError if it would be too large, or if something of it lies where no other machine can find it.
    """
    files: dict[str, Path | bytes] = code()
    notes: list[str] = []
    weights: list[ContentFile] = []

    def place(name: str, file: Any) -> Any:
        """Returns a value, or for a file that a recipe names its path in the package."""
        if not isinstance(file, ContentFile):
            return file
        if name.endswith(".init_from") or not file.path:  # without a path it lies in the store already
            weights.extend([file] if file.path else [])
            return str(file)
        where = f"files/{file[:12]}/{Path(file.path).name}"
        files[where] = Path(file.path)
        return where

    values = plain_values(config, place)
    values["store"] = store_url
    values["run"]["output"] = output
    values["source"]["roots"] = PathPolicy.of((), config.source.roots).named
    if config.source.image_folder:
        values["source"]["image_folder"] = str(config.source.images_in(Path()))
    paths = values["source"]["paths"]
    for i, path in enumerate(paths):
        source = source_at(path)
        if source.everywhere:
            continue
        file = source.file
        if not (here and file.exists()) and _travels(source, config):
            paths[i] = f"lists/{i}/{file.stem}{ROWS_SUFFIX}"
            files[paths[i]] = _as_read(path, config, journal.forgotten)
            continue
        if file.exists():
            paths[i] = str(file)
        if not here:
            notes.append(
                f"{path} is not copied: every machine must find it, and the files that it names, at {paths[i]}; "
                "images on S3 or the web need no such place"
            )
    for setting, value in named_weights(config, [stage.name for stage in config.stages]):
        named = ClipWeights.parse(value)
        local = named.folder or (named.tag if Path(named.tag).is_file() else "")
        if local and not Path(local).is_absolute():
            where = "its whole path, as the job runs in another folder" if here else "a path that the cluster has"
            raise UserError(f"{setting}: {local} is found from this folder only; write {where}")
        if local and not here:
            machines = "the cluster's head" + " and its GPU nodes" * (setting == "evaluation.judge")
            notes.append(f"{local} ({setting}) is not copied: {machines} must have it there")
    for tracker in config.run.trackers:
        files |= _module(tracker.partition(":")[0])
    files |= _plugins()
    files[PROJECT_FILE] = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
    package = Package(files, tuple(weights), tuple(notes))
    check_size(package)
    return package


def code() -> dict[str, Path | bytes]:
    """Returns the files of the code, and the presets, templates and pages that it reads."""
    files: dict[str, Path | bytes] = dict(_files(ROOT, CODE, "*.py"))
    for folder, suffixes in DATA.items():
        files |= {name: file for name, file in _files(ROOT, [folder], "*") if file.suffix in suffixes}
    return files


def check_size(package: Package) -> None:
    """Raises UserError, with the largest files, if a package is over the limit before it is compressed."""
    sizes = package.sizes
    if (total := sum(sizes.values())) <= LARGEST:
        return
    largest = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:NAMED]
    named = ", ".join(f"{name} ({size / (1 << 20):,.1f} MiB)" for name, size in largest)
    raise UserError(
        f"the package of this job has {total / (1 << 20):,.1f} MiB, over {LARGEST >> 20} MiB: {named}; cut a list and "
        "append the rest later, or put it in a folder that every machine mounts and give it images by file:// "
        "references"
    )


def write_zip(package: Package, path: Path) -> Path:
    """Writes the package as a zip whose bytes depend on names and contents alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(package.files.items()):
            entry = zipfile.ZipInfo(name)  # whose time is always 1980, and not that of the file
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, file if isinstance(file, bytes) else file.read_bytes())
    return path


def package_path(file: Path) -> str:
    """Returns the path of a zip in a store, for machines that read it there."""
    with open(file, "rb") as f:
        return f"{PACKAGES}/{hashlib.file_digest(f, 'sha256').hexdigest()}.zip"


def send_weights(store: Store, package: Package) -> None:
    """Stores what is too large for a package. Raises UserError for a file that changed."""
    for file in package.weights:
        put_content(store, file, "init_from")


def _files(root: Path, folders: Sequence[str], pattern: str) -> Iterator[tuple[str, Path]]:
    for folder in folders:
        for file in sorted((root / folder).rglob(pattern)):
            name = file.relative_to(root)
            if file.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in name.parts):
                yield name.as_posix(), file


def _module(name: str) -> dict[str, Path | bytes]:
    """Returns the files of a user's module; none if it is installed, as the cluster must have it too."""
    spec = importlib.util.find_spec(name.partition(".")[0])
    origin = Path(spec.origin) if spec and spec.origin else None
    installed = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib", "platstdlib")}
    if spec and origin is None and spec.submodule_search_locations:  # a folder without __init__.py
        folder = Path(next(iter(spec.submodule_search_locations)))
        return {} if installed & set(folder.parents) else dict(_files(folder.parent, [folder.name], "*.py"))
    if origin is None or not origin.is_file() or installed & set(origin.parents):
        return {}
    if origin.name == "__init__.py":
        return dict(_files(origin.parents[1], [origin.parent.name], "*.py"))
    return {origin.name: origin}


def _plugins() -> dict[str, Path | bytes]:
    """Returns the modules of plug-ins, as ``_module`` does, and the metadata by which the job finds them."""
    files: dict[str, Path | bytes] = {}
    for package in distributions():
        for point in package.entry_points:
            if point.group.startswith("unclip.") and (modules := _module(point.module)):
                folder = f"{package.name}-{package.version}.dist-info"
                about = {name: package.read_text(name) or "" for name in ("METADATA", "entry_points.txt")}
                files |= modules | {f"{folder}/{name}": text.encode() for name, text in about.items()}
    return files


def _travels(source: Source, config: Config) -> bool:
    """Returns whether a list can travel: a file, whose rows name no files."""
    if source.file.is_dir():
        return False
    return not any(names_file(row.url) and not row.reject for row in read_rows(source.path, config.source))


def _as_read(path: str, config: Config, forgotten: frozenset[str]) -> bytes:
    """Returns a list's rows as this machine reads them; it stops at what a package takes."""
    out = io.BytesIO()

    def rows() -> Iterator[ListRow]:
        for row in read_rows(path, config.source):
            if out.tell() > LARGEST:
                return
            hit = forgotten & reference_marks(row.url)
            yield ListRow(FORGOTTEN + min(hit), ()) if hit else row

    write_rows(out, rows())
    return out.getvalue()
