"""Writes the page of a look at a list: one HTML file, in the manner of the report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from models.sampling_config import UPSAMPLERS
from pipeline.ledger import REASONS
from pipeline.look.images import SampledImages
from pipeline.look.overview import NO_PROPOSAL, Look, cut_by_preset
from pipeline.progress import counted, duration
from pipeline.report.charts import bars, histogram
from pipeline.report.data import kept_thumbnails, some_rejects
from pipeline.report.html import ENVIRONMENT, PARTS, Section, attempt, number, template
from pipeline.report.inputs import ReportInput
from pipeline.report.page import replace_file
from pipeline.report.rows import PairsShard
from pipeline.report.summary import HEAD, Tile
from pipeline.store import Store

LOOK = template("look.html")
THUMBNAILS = 48
LISTED = 20  # licences and scripts in a table


def write_look(look: Look, sample: SampledImages | None, store: Store, path: Path) -> None:
    """Writes the page, atomically, with images of the sample, which lie in ``store``.

    Raises UserError for a file that cannot be written.
    """
    sections = [
        attempt("The images", _images, look, sample, store) if sample else Markup(),
        attempt("The captions", _captions, look),
        attempt("The rejects", _rules, look, sample, store),
        attempt("The proposal", _proposal, look),
    ]
    contents = [section for section in sections if isinstance(section, Section)]
    page = ENVIRONMENT.get_template("page.html")
    names = ", ".join(look.paths)
    text = page.render(
        project=names, kind="a look", refresh=None, head=_head(look), sections=sections, contents=contents
    )
    replace_file(path, text, "name another file")


def _head(look: Look) -> Markup:
    bad = sum(rule.rows for rule in look.rules if not rule.sampled)
    said = f"{counted(look.pairs, 'pair')} in {counted(look.rows, 'row')}; nothing is trained or stored yet."
    images, captions = look.images, look.captions
    usable = f"{images.kept:,} of {images.rows:,}" if images else "–"
    reach = "none was fetched"
    if images:
        reach = ", ".join(f"{count:,} reach {side} px" for side, count in images.reaching.items())
    preset = f"preset {look.proposal.preset}" if look.proposal else "–"
    tiles = [
        Tile("Rows", number(look.rows), f"{bad:,} of them will be rejected, by what the list says", "rules"),
        Tile("Images of a sample", usable, f"can be used; {reach}", "images" if images else ""),
        Tile(
            "Captions",
            f"{captions.quantile(0.5)} tokens",
            f"median; cut: {'; '.join(cut_by_preset(captions))}",
            "captions",
        ),
        Tile("To begin with", preset, str(look.proposal or NO_PROPOSAL), "proposal"),
    ]
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return HEAD.head(", ".join(look.paths), said, when, tiles, [])


def _shard(sample: SampledImages) -> PairsShard:
    kept = {row["key"] for row in sample.kept} - sample.unfit.keys()
    return PairsShard(sample.shard, sample.rows, kept, dict(sample.captions), dict(sample.unfit))


def _images(look: Look, sample: SampledImages, store: Store) -> Markup:
    given, images = ReportInput(store, {}), look.images
    title = f"Some of the {counted(len(sample.rows), 'row')} of the sample"
    parts = [kept_thumbnails(given, [_shard(sample)], title, THUMBNAILS)]
    if images and images.kept:
        sides = list(Counter(images.short_sides).elements())
        said = f"Short sides of {counted(images.kept, 'image')} as stored; {images.equal:,} equal another one."
        reach = [("images that can be used", images.kept)]
        models = {side: name for name, side in UPSAMPLERS.items()}
        reach += [
            (f"{side} px and more: {models.get(side, 'priors and decoder')}", count)
            for side, count in images.reaching.items()
        ]
        parts.append(
            PARTS.beside(
                [
                    PARTS.figure(histogram("Short sides of images", "px", sides), said),
                    PARTS.figure(bars("Images by size", reach), "A model trains on images of at least its size."),
                ]
            )
        )
    parts.append(_table("Licences", "licence", look.licenses))
    return Section.of(LOOK.images, "images", "Images", parts)


def _captions(look: Look) -> Markup:
    captions = look.captions
    parts = []
    if captions.captions:
        lengths = list(Counter(captions.tokens).elements())
        said = (
            f"Tokens of {counted(captions.captions, 'caption')} of {counted(captions.rows, 'row')}, by CLIP's own BPE; "
            f"cut: {'; '.join(cut_by_preset(captions))}."
        )
        charts = [PARTS.figure(histogram("Lengths of captions", "tokens", lengths), said)]
        scripts = list(captions.scripts.items())[:LISTED]
        charts.append(
            PARTS.figure(bars("Scripts of captions", scripts, False), "Captions by the script of most letters.")
        )
        parts.append(PARTS.beside(charts))
    if captions.frequent:
        parts.append(_table("Most frequent captions", "first caption", dict(captions.frequent)))
    doubles = (
        f"{look.repeated_captions:,} of {counted(look.captions_compared, 'first caption')} repeat an earlier one; "
        f"{counted(look.repeated_images, 'row')} name an image that an earlier row names."
    )
    return Section.of(LOOK.captions, "captions", "Captions", [*parts, PARTS.note(doubles)])


def _table(title: str, what: str, counts: Mapping[str, int]) -> Markup:
    rows = [(name, number(count)) for name, count in list(counts.items())[:LISTED]]
    return PARTS.folded(title, LOOK.counts(what, rows, max(0, len(counts) - LISTED)))


def _rules(look: Look, sample: SampledImages | None, store: Store) -> Markup:
    rows = [(rule.stage, rule.said, REASONS[rule.reason], number(rule.rows), rule.among) for rule in look.rules]
    parts = [LOOK.rules(rows), LOOK.advice(look.advice)]
    if sample:
        parts.append(attempt("Some rejected rows", some_rejects, ReportInput(store, {}), [_shard(sample)]))
    return Section.of(LOOK.rejected, "rules", "What will be rejected", parts)


def _proposal(look: Look) -> Markup:
    rows = [
        (each.where, each.recipe, "not known" if each.seconds is None else duration(each.seconds), " ".join(each.lacks))
        for each in look.estimates
    ]
    return Section.of(LOOK.proposal, "proposal", "To begin with", [LOOK.begin(str(look.proposal or NO_PROPOSAL), rows)])
