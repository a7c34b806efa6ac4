"""``unclip init NAME [SOURCE ...]``: writes NAME.yaml, a commented configuration for pairs of your own."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.bundles import find_bundle
from jobs.output import say
from models.sampling_config import UPSAMPLERS
from models.tokens import cut_captions
from pipeline.config import check_project, load_config
from pipeline.data.curation.row_filter import FilterRecipe
from pipeline.data.fetch.references import shown
from pipeline.data.pairs.lost import NEARLY_ALL, place_advice
from pipeline.data.pairs.preview import MOST_COUNTED, ListPreview, behind_embeddings, preview
from pipeline.data.source.lists import pinned
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.ledger import REASONS
from pipeline.pages import page
from pipeline.progress import counted
from pipeline.starter import CLIP_PAIRS, embedded, existing_clip, models_for, sizes_seen, starter

NAMED = 3  # images that cannot be opened
READING = ("image_column", "caption_column", "image_folder", "encoding")  # options, and fields of the source
OPTIONS = {"source.image_column": "--image-column and --caption-column", "source.encoding": "--encoding"}
VALUE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")
ENOUGH = 1000  # pairs, below which models memorise images


@dataclass(frozen=True)
class InitResult:
    """Describes a configuration that was written.

    Attributes:
        path: File of the configuration.
        remarks: Lines about the list, its models, and the rows that a run would reject.
        first: Change that is to be made before anything can run; "" if none is.
        commands: Commands to type next.
    """

    path: Path
    remarks: tuple[str, ...]
    first: str
    commands: tuple[str, ...]


def main(arguments: argparse.Namespace) -> int:
    """Writes the configuration and says what to do next."""
    reading = {name: getattr(arguments, name) for name in READING}
    made = init(arguments.name, arguments.sources, arguments.origin, **reading)
    say(f"{made.path} written; its comments explain what you can change")
    for remark in made.remarks:
        say(remark)
    if made.first:
        say(f"next: {made.first}")
    say("\n    ".join(["then:" if made.first else "next:", *made.commands]))
    return 0


def init(name: str, sources: Sequence[str] = (), origin: str | None = None, **reading: Any) -> InitResult:
    """Writes NAME.yaml, a commented configuration for pairs of one's own.

    Args:
        name: Name of the project.
        sources: Lists as in ``source.paths``.
        origin: Bundle to go on from.
        reading: Fields of ``source``, those of READING.

    Raises:
        UserError: For a name that is taken or is none, and for lists that cannot be read.
    """
    name = name.removesuffix(".yaml")
    if "/" in name or (Path(name).exists() and not sources):
        raise UserError(f"unclip init NAME SOURCE: a name comes first; write unclip init my-project {name}")
    check_project(name)
    if word := next((each for each in sources if VALUE.match(each) and not Path(each).exists()), None):
        raise UserError(f"{word}: init takes lists and no KEY=VALUE; write it into {name}.yaml once that is there")
    path = Path(f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path} exists already and is not overwritten; remove it, or choose another name")
    source = SourceRecipe(tuple(map(pinned, sources)) or ("pairs.csv",), **reading)
    lists = [behind_embeddings(Path(os.path.expanduser(folder)), source) for folder in embedded(source)]
    fetched = all(metadata for metadata, _ in lists) and len(lists) == len(source.paths)
    if fetched:
        source = SourceRecipe(tuple(metadata for metadata, _ in lists), **reading)
    seen = preview_named(source) if sources else None
    start = Path(os.path.abspath(find_bundle(origin).folder)) if origin else None
    gpu = _has_gpu()
    text = starter(name, gpu, source, seen, start)
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
    if seen is None:
        first = f"name your list in place of {source.paths[0]} below source: paths: in {path}"
        return InitResult(path, (), first, (f"unclip doctor {path}",))
    remarks = [*_remarks(seen, load_config(path).clip.model.text_context)]
    bare, imageless = embedded(source), len(embedded(source)) == len(source.paths)
    if not imageless and (line := _left_out(seen)):
        remarks.append(line)
    if fetched:
        remarks.append(
            f"{source.paths[0]}: the list of images from which the embeddings beside it were made; a run fetches them, "
            "and all models train. For priors alone, on the embeddings, name their folder in source.paths and their "
            "CLIP in clip.weights"
        )
    if bare:
        here = next((f" ({folder} has them)" for _, folder in lists if folder), "")
        remarks.append(
            f"{bare[0]}: embeddings, without images: clip.weights in {path} has to name the CLIP that made them, and "
            f"only priors train on them; name images with captions as another source{here}, and all models train"
        )
    if start is None:
        remarks += _clip_remarks(seen, path, existing_clip(gpu, source, seen), bool(bare))
    if first := _blocked(seen):
        return InitResult(path, tuple(remarks), first, (f"unclip doctor {path}",))
    until = " --until diffusion_prior" if imageless else ""
    look = () if gpu or until or start else (f"unclip run {path} preset=nano    # a first look, in minutes",)
    return InitResult(path, tuple(remarks), "", (f"unclip doctor {path}", *look, f"unclip run {path}{until}"))


def _clip_remarks(seen: ListPreview, path: Path, exists: bool, bare: bool) -> Iterator[str]:
    """Yields which CLIP a configuration has, one that ``exists`` or one that trains on the list, and warnings."""
    if exists:
        if not bare:
            yield (
                f"clip.weights names a pretrained CLIP, a download of 0.6 GB: with fewer than {CLIP_PAIRS:,} pairs it "
                "is better than one trained on them"
            )
        return
    if seen.pairs < CLIP_PAIRS:
        yield (
            f"warning: a CLIP trained on fewer than {CLIP_PAIRS:,} pairs is poor; use an existing one, which is slow "
            f"without a GPU: uncomment clip.weights in {path}, or go on from a run's models with --from"
        )
    if 2 * seen.framed.rows > seen.rows:
        yield (
            f"warning: every caption of {seen.framed.rows:,} of {seen.rows:,} rows begins or ends with words that many "
            f"share, such as {seen.framed.words!r}, and a CLIP that trains on them learns those words, not the "
            f"objects; add the bare text as a second caption of each row: {page('captions')}"
        )


def _blocked(seen: ListPreview) -> str:
    """Returns what to do about a list of whose images a run could read almost none; "" for any other."""
    blocked = len(seen.forbidden) + len(seen.private) + len(seen.unopened)
    if blocked < NEARLY_ALL * (seen.rows + len(seen.forbidden)):  # never where there is no row
        return ""
    advice = place_advice("forbidden_reference", seen.forbidden) or place_advice("forbidden_address", seen.private)
    advice = advice or (seen.unopened and "mend the images named above") or "name another list"
    return f"no run reads these images as it stands; {advice}"


def preview_named(source: SourceRecipe) -> ListPreview:
    """Returns a preview of lists that the command line names. Raises UserError, which names its options."""
    try:
        return preview(source)
    except UserError as e:
        for field, options in OPTIONS.items():  # there is no configuration yet in which that could be set
            if field in str(e):
                raise UserError(f"{e}, here with {options}") from None
        raise


def _has_gpu() -> bool:
    from pipeline.graph.device import choose_device

    return choose_device("auto").type == "cuda"


def _left_out(seen: ListPreview) -> str:
    """Returns which models are left out for want of large images, or how to if that is not known; "" if none is."""
    if not seen.sides and not seen.unopened:
        return (
            "images are measured once they are fetched; where few reach 1024 px, as on the web, set bundle.models="
            f"[{','.join(models_for(seen)[0][:-1])}] bundle.sampling.size=256"
        )
    models, size = models_for(seen)
    left_out = " and ".join(name for name in UPSAMPLERS if name not in models)
    return left_out and f"bundle.models leaves {left_out} out, and samples have {size} px: {sizes_seen(seen)}"


def _remarks(seen: ListPreview, context: int) -> Iterator[str]:
    """Yields what was found, and warnings about what a run would reject, with a CLIP that reads ``context`` tokens."""
    yield f"pairs found: {seen.pairs:,}{' or more' if seen.behind >= MOST_COUNTED else ''}"
    if seen.pairs < ENOUGH:
        yield f"warning: fewer than {ENOUGH:,} pairs are enough to try it, but the models will memorise them"
    if seen.flaws:
        many = counted(len(seen.flaws), "row")
        yield f"warning: {many} more cannot be read and will be left out; the first: {seen.flaws[0]}"
    yield from (f"warning: {left}" for left in seen.unread)
    for reason, rows in seen.left_out.items():
        yield f"warning: {counted(rows, 'row')} more {'is' if rows == 1 else 'are'} left out: {REASONS[reason]}"
    if bare := seen.rows - len(seen.captions):
        yield f"warning: {counted(bare, 'row')} more without a caption, which no model trains on"
    most = FilterRecipe.max_caption
    if long := sum(len(caption) > most for caption in seen.captions):
        yield (
            f"warning: {long:,} of the first {len(seen.captions):,} captions have more than {most:,} characters and "
            "will be left out: write curation: {max_caption: ...}, or shorten them"
        )
    if cut := cut_captions(seen.captions, context):
        many = f"{cut:,} of the first {counted(len(seen.captions), 'caption')}"
        yield f"{many} have more than the {context - 2} tokens that this CLIP reads; the rest is cut"
    if seen.forbidden:
        yield (
            f"warning: {len(seen.forbidden):,} rows are left out, which name what a list may not, such as "
            f"{shown(seen.forbidden[0])[:200]!r}; "
            + (place_advice("forbidden_reference", seen.forbidden) or "source.roots names places that it may")
        )
    if seen.private:
        yield (
            f"warning: the addresses of {counted(len(seen.private), 'image')} are not public, such as "
            f"{shown(seen.private[0])[:200]!r}; {place_advice('forbidden_address', seen.private)}"
        )
    if seen.unopened:
        of = len(seen.sides) + len(seen.unopened)
        yield f"warning: {len(seen.unopened)} of the first {of} images cannot be opened and will be left out:"
        for url, reason in seen.unopened[:NAMED]:
            yield f"    {url.removeprefix('file://')[:200]}: {reason}: {REASONS[reason]}"
    if small := len(seen.sides) - seen.reaching(64):
        yield f"warning: {small} of the first {len(seen.sides)} images are below 64 px, too small to train on"
