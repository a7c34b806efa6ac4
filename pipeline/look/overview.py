"""Looks at a list: the result, as values, as JSON and as the lines that a terminal shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from pipeline.config import Config, load_config
from pipeline.data.fetch.references import shown
from pipeline.data.pairs.lost import place_advice
from pipeline.data.pairs.preview import ListPreview
from pipeline.data.source.journal import EMPTY, ListJournal
from pipeline.data.source.rows import stored_rows
from pipeline.data.source.stage import scan
from pipeline.graph.artifacts import read_table
from pipeline.graph.ray import this_machine
from pipeline.ledger import DEFERRED, REASONS
from pipeline.look.captions import CaptionLook, look_at_captions
from pipeline.look.images import ImageLook, SampledImages, look_at_images, pack_sample
from pipeline.look.proposal import PlacedEstimate, Proposal, estimates, propose
from pipeline.look.survey import OTHER, ListSurvey
from pipeline.progress import counted, duration
from pipeline.store import Store

NO_PROPOSAL = "none, because no image of the sample can be used"
UNNAMED = "not named"  # a licence
NAMED, NAME_CHARACTERS = 4, 60  # licences and scripts in a line, and characters of one
MANY = 0.1  # of the captions or images: worth a sentence of advice
CAPTION_RULES = ("no_caption", "caption_too_short", "caption_too_long")  # judged for every row of the list


@dataclass(frozen=True)
class RuleCount:
    """Holds how many rows a stage will reject or defer for one reason.

    Attributes:
        stage: Name of the stage.
        reason: Reason of pipeline.ledger.
        rows: Rows that it rejects or defers.
        of: Rows that were looked at.
        sampled: True where these are a sample, False where they are all rows that come so far.
    """

    stage: str
    reason: str
    rows: int
    of: int
    sampled: bool

    @property
    def said(self) -> str:
        """Returns the reason, and whether its rows are tried again."""
        return self.reason + ", deferred" * (self.reason in DEFERRED)

    @property
    def among(self) -> str:
        """Returns among how many rows."""
        return f"{self.of:,} {'of the sample' if self.sampled else 'rows'}"


@dataclass(frozen=True, repr=False)
class Look:
    """Holds what a look at a list found. As text it is what ``unclip data look`` prints.

    Attributes:
        paths: Paths of the list.
        rows: Rows of the list.
        pairs: Rows that the list itself does not make unusable, and that have a caption.
        splits: Rows that are not rejected as the list is read, by split.
        licenses: The same rows by licence.
        repeated_images: Rows that name an image which an earlier row names.
        repeated_captions: First captions that an earlier row has, too, among the first ``captions_compared``.
        captions_compared: First captions that were compared, a million at most.
        captions: Captions of rows drawn at random.
        images: Images of a sample of these rows; None where the list has no images.
        rules: Rows that each stage will reject or defer, by reason, as far as that can be known without CLIP.
        advice: Steps to take, a sentence each.
        proposal: Configuration to begin with; None where images were asked for and none can be used.
        estimates: Time of a run, by place.
    """

    paths: tuple[str, ...]
    rows: int
    pairs: int
    splits: Mapping[str, int]
    licenses: Mapping[str, int]
    repeated_images: int
    repeated_captions: int
    captions_compared: int
    captions: CaptionLook
    images: ImageLook | None
    rules: tuple[RuleCount, ...]
    advice: tuple[str, ...]
    proposal: Proposal | None
    estimates: tuple[PlacedEstimate, ...]

    def __repr__(self) -> str:
        return "\n".join(_lines(self))


def look_at(
    config: Config,
    seen: ListPreview,
    store: Store,
    images: int,
    overrides: Sequence[str] | None = None,
    journal: ListJournal = EMPTY,
    tell: Callable[[str], object] = lambda _: None,
) -> tuple[Look, SampledImages | None]:
    """Reads a whole list, fetches the images of a sample, and judges both by the rules of a configuration.

    Args:
        config: Configuration whose list and rules count.
        seen: A preview of its list.
        store: An empty store, for the list and the images of the sample.
        images: Most rows whose images are fetched.
        overrides: Values in place of those of the proposal, which is what is estimated; None estimates ``config``.
        journal: References to be forgotten.
        tell: Function that takes a line before the images are fetched.

    Raises:
        UserError: for a list that cannot be read.
    """
    survey = ListSurvey(config.curation)
    found = scan(config.source, store, write=True, journal=journal)
    for shard in found.shards:
        for row in stored_rows(read_table(store, shard.refs), read_table(store, shard.captions)):
            survey.add(row)
    sample = looked = None
    if chosen := survey.pictured(images):
        tell(f"fetching {counted(len(chosen), 'image')} of {counted(survey.rows, 'row')}")
        sample = pack_sample(config, store, chosen)
        looked = look_at_images(sample)
        if looked.kept:
            sides = tuple(Counter(looked.short_sides).elements())
            seen = replace(seen, sides=sides, unopened=(), stated=False)
    machine = this_machine(config.run.ray)
    proposed, values = propose(config.source, seen, bool(machine.gpus))
    on_gpu, gpu_values = propose(config.source, seen, True)
    if overrides is None:
        here = with_gpu = (config, "as configured")
    else:
        here = (load_config(values, overrides), _recipe(proposed, overrides))
        with_gpu = (load_config(gpu_values, overrides), _recipe(on_gpu, overrides))
    held_out = max(found.held_out.values(), default=0) / max(1, found.rows)
    captions = look_at_captions(survey.drawn)
    rules = tuple(_rules(survey, sample))
    unseen = looked is not None and not looked.kept
    look = Look(
        config.source.paths,
        survey.rows,
        survey.kept - survey.captionless,
        {"train": found.rows - sum(found.held_out.values()), **found.held_out},
        {license or UNNAMED: count for license, count in survey.licenses.most_common()},
        survey.lost["duplicate_url"],
        survey.repeated,
        survey.hashed,
        captions,
        looked,
        rules,
        tuple(_advice(config, seen, captions, rules, looked, sample)),
        None if unseen else proposed,
        ()
        if unseen and overrides is not None
        else tuple(estimates(here, with_gpu, max(1, found.rows), held_out, machine)),
    )
    return look, sample


def _recipe(proposal: Proposal, overrides: Sequence[str]) -> str:
    given = dict(word.split("=", 1) for word in overrides)
    preset, scale = given.get("preset", proposal.preset), float(given.get("scale", proposal.scale))
    return f"preset {preset}" + (f", scale {scale:g}" if scale != 1 else "")


def _rules(survey: ListSurvey, sample: SampledImages | None) -> Iterator[RuleCount]:
    for reason, count in survey.lost.most_common():
        yield RuleCount("source", reason, count, survey.rows, False)
    if sample:
        lost = Counter(row["reason"] for row in sample.rows if row["reason"])
        for reason, count in lost.most_common():
            yield RuleCount("pairs", reason, count, len(sample.rows), True)
    for reason, count in survey.unfit.most_common():
        yield RuleCount("curation", reason, count, survey.kept, False)
    if sample:
        sizes = Counter(reason for reason in sample.unfit.values() if reason not in CAPTION_RULES)
        for reason, count in sizes.most_common():
            yield RuleCount("curation", reason, count, len(sample.kept), True)


def _advice(
    config: Config,
    seen: ListPreview,
    captions: CaptionLook,
    rules: Sequence[RuleCount],
    images: ImageLook | None,
    sample: SampledImages | None,
) -> Iterator[str]:
    lost = {rule.reason: rule.rows for rule in rules}
    if seen.flaws:
        yield f"Some rows cannot be read; the first: {seen.flaws[0]}."
    yield from (f"{left}." for left in seen.unread)
    if lost.get("forbidden_reference"):
        named = f", such as {shown(seen.forbidden[0])[:200]}" if seen.forbidden else ""
        advice = place_advice("forbidden_reference", seen.forbidden) or "if that is yours, name it under source.roots"
        yield f"Some rows name what a list may not{named}: {advice}."
    if long := lost.get("caption_too_long"):
        yield (
            f"{counted(long, 'first caption')} over {config.curation.max_caption:,} characters: they are left out. "
            "Raise curation.max_caption, or shorten the captions."
        )
    reads = config.clip.model.text_context - 2
    cut = sum(count for length, count in captions.tokens.items() if length > reads)
    if cut > max(MANY * captions.captions, lost.get("caption_too_long", 0)):  # which are as long, and left out
        yield (
            f"{cut:,} of {counted(captions.captions, 'caption')} are longer than the {reads} tokens that CLIP reads, "
            "and the rest is cut: describe the image first."
        )
    if captions.captions and captions.scripts.get("Latin", 0) < (1 - MANY) * captions.captions:
        yield (
            "Many captions are not in Latin script: CLIP's tokenizer was built from English text, so such captions "
            "take more tokens, and an existing CLIP may not know the language."
        )
    if 2 * captions.framed > captions.rows:
        yield (
            f"Every caption of {captions.framed:,} of {counted(captions.rows, 'row')} begins or ends with words that "
            f"many share, such as {captions.frame!r}: a CLIP that trains on them learns those words. Add the bare text "
            "as a second caption of each row."
        )
    if sample and lost.get("forbidden_address"):
        urls = [row["url"] for row in sample.rows if row["reason"] == "forbidden_address"]
        yield f"Some images are at addresses that are not public: {place_advice('forbidden_address', urls)}."
    if lost.get("needs_heif"):
        yield "HEIC images are read once pip install 'pillow-heif>=1,<2' has run."
    if images and images.kept < (1 - MANY) * images.rows:
        yield f"{images.rows - images.kept:,} of {counted(images.rows, 'image')} of the sample cannot be used."
    if images and images.equal:
        yield f"The sample holds {counted(images.equal, 'image')} more than once: are some listed twice?"


def _lines(look: Look) -> Iterator[str]:
    yield f"{', '.join(look.paths)}: {counted(look.rows, 'row')}, {counted(look.pairs, 'pair')}"
    yield f"licences   {_listed(look.licenses)}"
    if images := look.images:
        reach = ", ".join(f"{count:,} reach {side} px" for side, count in images.reaching.items())
        median = sorted(Counter(images.short_sides).elements())[images.kept // 2] if images.kept else 0
        sides = f"; short sides: median {median:,} px, {reach}" if images.kept else ""
        yield f"images     {images.kept:,} of a sample of {images.rows:,} can be used{sides}"
    captions = look.captions
    yield (
        f"captions   {counted(captions.captions, 'caption')} of {counted(captions.rows, 'row')}: median "
        f"{captions.quantile(0.5)} tokens, at most {captions.quantile(1)}; cut: {'; '.join(cut_by_preset(captions))}"
    )
    yield f"scripts    {_listed(captions.scripts)}"
    equal = f", {look.images.equal:,} images of the sample equal another" if look.images else ""
    yield (
        f"doubles    {look.repeated_images:,} rows name an image of an earlier row, {look.repeated_captions:,} of "
        f"{look.captions_compared:,} first captions repeat an earlier one{equal}"
    )
    none = "" if look.rules else " nothing"
    yield f"rejects    as far as they are known without CLIP:{none}"
    for rule in look.rules:
        yield f"  {rule.stage:10}{rule.said:28}{rule.rows:>9,} of {rule.among}  {REASONS[rule.reason]}"
    yield from look.advice
    yield f"proposal   {look.proposal or NO_PROPOSAL}"
    width = max((len(each.where) for each in look.estimates), default=0)
    for each in look.estimates:
        takes = "not known" if each.seconds is None else f"about {duration(each.seconds)}"
        yield f"  {each.where:{width}}  {takes}  ({'; '.join((each.recipe, *each.lacks))})"


def cut_by_preset(captions: CaptionLook) -> Iterator[str]:
    """Yields how many captions are cut, for each number of tokens that the CLIP of a preset reads."""
    for reads in sorted(set(captions.reads.values())):
        presets = [name for name, most in captions.reads.items() if most == reads]
        yield f"{captions.cut[presets[0]]:,} by the {reads} tokens of {', '.join(presets)}"


def _listed(counts: Mapping[str, int]) -> str:
    some = [f"{name[:NAME_CHARACTERS]} {count:,}" for name, count in islice(counts.items(), NAMED)]
    return ", ".join(some + [f"{len(counts) - NAMED} {OTHER}"] * (len(counts) > NAMED)) or "none"
