"""Reads JSON files of images and captions: COCO's, LLaVA's, kohya's, and lists of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.source.columns import KNOWN, MOST_SHOWN, Flaw, columns_of
from pipeline.data.source.parsers.child import Budget
from pipeline.data.source.parsers.encoding import decoded
from pipeline.data.source.parsers.text import HEAD_LINES, object_values
from pipeline.errors import UserError
from pipeline.progress import counted, say_once

KINDS = "captions of COCO, conversations of LLaVA, metadata of kohya, or a list of objects"
ANSWERS = ("gpt", "assistant")  # who says the caption in a conversation


def annotation_rows(
    opened: BinaryIO, path: Path, budget: Budget, wanted: Sequence[str], encoding: str = ""
) -> Iterator[list[Any] | Flaw]:
    """Yields for each image its name, its captions, its values in the other columns; the last is the URL of COCO.

    Raises:
        UserError: for a file that is none of KINDS.
    """
    try:
        found = json.loads(decoded(opened.read(), encoding))
    except UnicodeDecodeError as e:
        raise UserError(
            f"source {path}: byte {e.start + 1} is not UTF-8; set source.encoding to its encoding"
        ) from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"source {path}: not JSON ({e}); a file with an object a line is called .jsonl") from None
    rows: Iterator[tuple[str, list[Any]]]
    if isinstance(found, dict) and isinstance(found.get("images"), list):
        _check_columns(path, wanted)
        rows = _coco(path, found, len(wanted))
    elif isinstance(found, dict) and found and all(isinstance(value, dict | str) for value in found.values()):
        _check_columns(path, wanted)
        rows = _by_name(found, len(wanted))
    elif isinstance(found, list) and any(isinstance(each, dict) for each in found):
        rows = _objects(path, found, wanted)
    else:
        raise UserError(f"source {path}: unsupported JSON; give {KINDS}")
    for where, values in rows:
        yield object_values(where, values)


def _check_columns(path: Path, wanted: Sequence[str]) -> None:
    """Raises UserError where columns are named for a format that has none."""
    for column, usual, option in zip(wanted, KNOWN, ("image_column", "caption_column"), strict=False):
        if column != usual:
            raise UserError(f"source {path}: COCO's and kohya's JSON have no column {column}; leave out {option}")


def _coco(path: Path, found: Mapping[str, Any], width: int) -> Iterator[tuple[str, list[Any]]]:
    """Yields the images in their order, each with the captions of its annotations in theirs."""
    captions: dict[Any, list[Any]] = {}
    for each in _objects_of(found.get("annotations")):
        if "caption" in each and isinstance(each.get("image_id"), int | str):
            captions.setdefault(each["image_id"], []).append(each["caption"])
    if not captions:
        raise UserError(f"source {path}: its annotations have no captions; COCO's are in captions_*.json")
    licenses = {str(each.get("id")): each.get("url") for each in _objects_of(found.get("licenses"))}
    for number, image in enumerate(_objects_of(found["images"]), 1):
        key = image.get("id")
        texts = captions.pop(key, []) if isinstance(key, int | str) else []
        url = image.get("coco_url") or image.get("url") or image.get("flickr_url")
        rest = [None, None, licenses.get(str(image.get("license"))), *[None] * (width - 6)]
        yield f"image {number}", [image.get("file_name"), texts, *rest, url]
    for key, texts in captions.items():
        yield f"image {key}, which is not listed", [None, texts, *[None] * (width - 2)]


def _by_name(found: Mapping[str, Any], width: int) -> Iterator[tuple[str, list[Any]]]:
    """Yields images by name, which kohya gives no suffix, each with its captions, the first followed by its tags."""
    for name, about in found.items():
        said = about if isinstance(about, dict) else {"caption": about}
        caption, tags = said.get("caption"), said.get("tags")
        texts = caption if isinstance(caption, list) else [caption] if caption else []
        tags = ", ".join(map(str, tags)) if isinstance(tags, list) else tags
        if isinstance(tags, str) and tags:
            texts = [f"{texts[0]}, {tags}" if texts else tags, *texts[1:]]
        yield name[:MOST_SHOWN], [name, texts, *[None] * (width - 2)]


def _objects(path: Path, found: Sequence[Any], wanted: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yields objects as rows of a table, and conversations with their answer as the caption."""
    names = list(dict.fromkeys(name for each in _objects_of(found[:HEAD_LINES]) for name in each))
    talks = "conversations" in names and wanted[1] not in names
    needed = 1 if talks else 2
    columns = [*columns_of(path, names, wanted[:needed], needed), *(["conversations"] if talks else ()), *wanted[2:]]
    longer = 0
    for number, each in enumerate(found, 1):
        where = f"object {number}"
        if not isinstance(each, dict):
            yield where, [[each], *[None] * (len(columns) - 1)]  # which is refused as a reference
            continue
        values = [each.get(name or "") for name in columns]
        if talks:
            answers = [turn for turn in _objects_of(values[1]) if turn.get("from") in ANSWERS]
            longer += len(answers) > 1
            values[1] = answers[0].get("value") if len(answers) == 1 else None
        yield where, values
    if longer:
        say_once(f"{path.name}: {counted(longer, 'conversation')} with several answers left out")


def _objects_of(value: Any) -> Iterator[dict[str, Any]]:
    """Yields the objects in a list."""
    return (each for each in value if isinstance(each, dict)) if isinstance(value, list) else iter(())
