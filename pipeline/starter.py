"""The text of a first configuration: for pairs of one's own, and to go on from a finished bundle."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from models.sampling_config import MODELS, PRIORS, UPSAMPLERS, largest_side
from pipeline.config import SCHEMA, Config, preset_config
from pipeline.data.pairs.preview import ListPreview
from pipeline.data.source.lists import lists_there
from pipeline.data.source.recipe import SourceRecipe
from pipeline.errors import UserError
from pipeline.held_out import FEWEST
from pipeline.pages import page
from pipeline.parse import load_yaml
from pipeline.progress import counted

# Rows to hold out: the 16 and 32 by which models can be judged, and a quarter more, because some are always lost.
VALIDATION, TEST = 20, 40
SHARE, MOST = 0.02, 0.2  # of the rows: held out of a large list, and at most of a small one
CAPTIONS = 4  # of the list, for which a run draws images
CAPTION_BYTES = 75  # a token of CLIP's is at least a byte and CLIP reads 75, so sampling can never refuse these

CLIP_PAIRS = 1_000_000  # with fewer a CLIP that is trained on them alone knows less than one that exists
CLIP_WEIGHTS = "open_clip:ViT-B-32:openai"

# How often a training may see a pair. Diffusion models of text learn from repeated data as from new data for some 100
# epochs, autoregressive ones for 4 (Prabhudesai et al. 2025, "Diffusion beats autoregressive in data-constrained
# settings").
EPOCHS = 100
LEAST_SAMPLES = 1_000_000  # of the longest training: with fewer, a model of preset small has not learned what there is
FEW_PAIRS = LEAST_SAMPLES // EPOCHS  # below which preset tiny is enough, and learns them in minutes on a GPU, too
# Beyond which a decoder of preset tiny came nearer to unseen captions with dropout; how much more samples did is not
# known.
BARE_EPOCHS = 20
DROPOUT = 0.1  # of Table 3's decoder

# Models that go on from a bundle's weights, and the share of their preset's learning rate. With a tenth, a decoder of
# preset tiny learnt the colours of another kind of image, and nothing of its parts (docs/gallery.md).
# Not the priors: an AR prior speaks the codes of the codec that it was trained with, and a diffusion prior may begin
# with a regression on the captions of its pairs. Both belong to other pairs.
TUNED = {"decoder": 1.0, **dict.fromkeys(UPSAMPLERS, 0.1)}
LENGTH = 4  # a training from random weights is this many times as long
WARMUP = 100  # steps: the optimiser knows nothing of the weights that it is given
SHORTEST = 10  # batches; and the warmup is at most such a part of the training

TEMPLATE = """\
# yaml-language-server: $schema={schema}
# Written by unclip init for your own pairs. First run: {your_data}; why rows are rejected: {ledger};
# every field and its default: {configuration}
project: {project}
preset: {preset} # nano: a quick test; tiny: a CPU, or few pairs; small: one GPU; karlo, paper: GPU clusters
{scale}store: {store} # on a cluster: s3://bucket/prefix

source:
  paths: # relative to this file; if you append a list later, only its own rows are processed
{paths}
  # roots: [/data/images, s3://BUCKET] # other places that lists may refer to, besides the web and their own folder
  # Column names; common ones such as URL, TEXT or prompt are recognised; group, split and sha256 are read, too.
  image_column: {image_column}
  caption_column: {caption_column}
{reading}  # Shares of rows held out of training, by a hash of the row's group or, without one, its image reference.
  validation: {validation}
  test: {test}

{clip}{dropout}pairs:
  image_size: 1024 # larger images are resized to this short side; if bundle.sampling.size is 256, use 256 to save disk

bundle:
  # A model trains only on images whose short side is at least its output size: 64 px for the decoder, 256 and 1024 px
  # for the upsamplers. If you have no images that large, remove the upsampler and lower size.
  # {measured}
  # Add ar_prior to train a second prior, which prior: ar selects for sampling ({ar_prior}).
  models: [{models}]
  sampling:
    size: {size} # side of generated images: 64, 256 or 1024 px

samples:
  captions: # an image of each is drawn at the end of a run; at most 75 tokens
{captions}

run:
  output: {output} # report.html and images
  budget_hours: 12 # a run estimated to take longer needs --yes; estimates without measurements assume two CPU cores
  # trackers: [tensorboard] # event files in output/tensorboard while models train; {report}
  # pairs: {{threads: 64, timeout_s: 60}} # more concurrent downloads, and a longer timeout for slow servers
  # ray: {{cpus: 8}} # cores for Ray on this machine; all by default
"""


FINE_TUNING = """
# Fine-tunes the models of {bundle}: CLIP is frozen; decoder and
# upsamplers train for a quarter of the preset's samples, times scale. The diffusion prior trains from scratch, because
# it starts from a ridge regression on these captions. If your images resemble the bundle's, divide learning_rate by 10.
# The split does not know the bundle's training pairs: if these lists contain some, the evaluation is too optimistic
# unless a split column holds out only pairs that the bundle has not seen.
{values}"""


def starter(project: str, gpu: bool, source: SourceRecipe, seen: ListPreview | None, bundle: Path | None = None) -> str:
    """Returns a configuration as YAML.

    Args:
        project: Name of the project.
        gpu: This machine has a GPU.
        source: The lists, and their columns.
        seen: A look at the source; without one, paths and captions are placeholders.
        bundle: A folder of models to go on from.

    Raises:
        UserError: The folder does not hold the models of a bundle.
    """
    preset = preset_for(gpu, seen)
    models, size = models_for(seen)
    recipes = preset_config(preset)
    longest = max(getattr(recipes, name).samples for name in models)
    clip, dropout, tuned = _clip(gpu, source, seen), _dropout(recipes, seen), ""
    if bundle is not None:
        clip = dropout = ""  # both are the bundle's
        values = _fine_tuning(bundle, preset)
        models = [name for name in models if name in values or name == PRIORS["diffusion"]]
        size = largest_side(models)
        values = {name: fields for name, fields in values.items() if name in ("clip", *models)}
        longest = max(values[name]["samples"] if name in values else getattr(recipes, name).samples for name in models)
        tuned = FINE_TUNING.format(bundle=bundle, values=yaml.safe_dump(values, sort_keys=False))
    lists = [f"- {_scalar(path)}" for path in source.paths]
    if seen is None:
        lists = [
            f"- {source.paths[0]} # put your own here: a .csv, .tsv, .jsonl or .parquet with the columns below,",
            "# - images # a folder of a.jpg and a.txt, or an imagefolder with metadata.jsonl,",
            "# - shards/00000.tar # webdataset tars, used where they lie; as many lists as you like",
        ]
    return (
        TEMPLATE.format(
            schema=SCHEMA,
            project=_scalar(project),
            preset=preset,
            store=f"out/{project}/store",
            paths=_indented(lists),
            image_column=_scalar(source.image_column),
            caption_column=_scalar(source.caption_column),
            reading="".join(f"  {name}: {_scalar(value)}\n" for name, value in _reading(source).items()),
            measured=sizes_seen(seen),
            models=", ".join(models),
            size=size,
            captions=_indented([f"- {_scalar(caption)}" for caption in _captions(seen)]),
            scale=_scale(longest, seen),
            clip=clip,
            dropout=dropout,
            **_splits(seen),
            output=f"out/{project}",
            your_data=page("your-data"),
            ledger=page("ledger"),
            configuration=page("configuration"),
            ar_prior=page("how/ar_prior"),
            report=page("report"),
        )
        + tuned
    )


def _reading(source: SourceRecipe) -> dict[str, str]:
    """Returns how the lists are read besides their columns, where it is not as usual."""
    return {name: value for name in ("image_folder", "encoding") if (value := getattr(source, name))}


def _fine_tuning(bundle: Path, preset: str) -> dict[str, dict[str, Any]]:
    """Returns values of a configuration with this preset, by stage: the bundle's CLIP, and its models to begin with.

    Raises UserError if the folder lacks a decoder.
    """
    found = [name for name in TUNED if (bundle / name / "config.json").is_file()]
    if "decoder" not in found:
        raise UserError(f"{bundle}: no decoder there to start from; name a bundle's folder or a run's output folder")
    recipes = preset_config(preset)
    tuned = {name: _values(bundle / name, getattr(recipes, name), TUNED[name]) for name in found}
    return {"clip": {"weights": f"local-dir:{bundle / 'clip'}"}, **tuned}


def _values(folder: Path, recipe: Any, share: float) -> dict[str, Any]:
    batches = max(SHORTEST, recipe.samples // recipe.batch // LENGTH)
    values: dict[str, Any] = {
        "init_from": str(folder / "model.safetensors"),
        "samples": batches * recipe.batch,
        "learning_rate": float(f"{share * recipe.learning_rate:.3g}"),  # 0.0003, and not 0.00030000000000000003
        "warmup_steps": min(WARMUP, batches // SHORTEST),
    }
    model = json.loads((folder / "config.json").read_text())["config"]
    usual = json.loads(json.dumps(asdict(recipe.model)))
    other = {name: value for name, value in model.items() if value != usual.get(name)}
    return values | ({"model": other} if other else {})


def embedded(source: SourceRecipe) -> list[str]:
    """Returns the paths of a source that are folders of embeddings, which have no images."""
    return [found.path for found in lists_there(source.paths) if found.embedded]


def existing_clip(gpu: bool, source: SourceRecipe, seen: ListPreview | None) -> bool:
    """Returns whether the configuration takes a CLIP that exists, rather than training one on these pairs."""
    return bool(embedded(source)) or (gpu and (seen is None or seen.pairs < CLIP_PAIRS))


def _clip(gpu: bool, source: SourceRecipe, seen: ListPreview | None) -> str:
    """Returns the lines of the CLIP: its weights, or a remark that names them."""
    says = f"# A pretrained CLIP (0.6 GB download) is better than one trained on fewer than about {CLIP_PAIRS:,} pairs."
    line = f'clip: {{weights: "{CLIP_WEIGHTS}"}}'
    if embedded(source):
        return f"# The CLIP that made the embeddings. This one is clip-retrieval's default.\n{line}\n\n"
    if existing_clip(gpu, source, seen):
        return f"{says}\n{line} # or train, on your own pairs\n\n"
    slow = "" if gpu else " It is slow\n# without a GPU: unclip plan estimates the time."
    return f"{says}{slow}\n# {line}\n\n"


def _scale(longest: int, seen: ListPreview | None) -> str:
    """Returns the line that shortens the trainings where there are few pairs, or nothing.

    The longest has ``longest`` samples. It sees each pair at most ``EPOCHS`` times, or ``LEAST_SAMPLES`` in all where
    that is more.
    """
    samples = longest if seen is None else max(LEAST_SAMPLES, EPOCHS * seen.pairs)
    if seen is None or not seen.pairs or samples >= longest:
        return ""
    scale = float(f"{samples / longest:.2g}")
    times = round(scale * longest / seen.pairs)
    return (
        f"scale: {scale} # multiplies all samples: the longest training sees each of {counted(seen.pairs, 'pair')} "
        f"about {times:,} times; {page('captions')}\n"
    )


def _dropout(recipes: Config, seen: ListPreview | None) -> str:
    """Returns the lines that give dropout to a decoder which has none and sees every pair often, or nothing."""
    decoder = recipes.decoder
    if seen is None or decoder.model.dropout or decoder.samples <= BARE_EPOCHS * seen.pairs:
        return ""
    says = f"# Each pair is seen more than {BARE_EPOCHS} times, so dropout reduces overfitting."
    return f"{says}\ndecoder: {{model: {{dropout: {DROPOUT}}}}}\n\n"


def preset_for(gpu: bool, seen: ListPreview | None) -> str:
    """Returns the preset to begin with: "small" where there are a GPU and pairs for it, else "tiny"."""
    return "small" if gpu and (seen is None or seen.pairs >= FEW_PAIRS) else "tiny"


def models_for(seen: ListPreview | None) -> tuple[list[str], int]:
    """Returns the models for which one image in a hundred is large enough, and the side that they end at.

    If no size is known, these are all models that sampling takes by default: not the AR prior.
    """
    models = [name for name in MODELS if name != PRIORS["ar"]]
    for size, left_out in ((1024, 0), (256, 1)):
        if seen is None or not seen.sides or 100 * seen.reaching(size) >= len(seen.sides):
            return models[: len(models) - left_out], size
    return models[:-2], 64


def sizes_seen(seen: ListPreview | None) -> str:
    """Returns a sentence that says how large the images are."""
    if seen is None or not seen.sides:
        return (
            "Images on the web are measured once they are downloaded: see the report after unclip run --until curation."
        )
    how = ", as the list says" if seen.stated else ", by their headers"
    return (
        f"Of the first {len(seen.sides):,} images {seen.reaching(1024):,} have a short side of 1024 px or more, "
        f"{seen.reaching(256):,} of 256 px, {seen.reaching(64):,} of 64 px{how}."
    )


def _splits(seen: ListPreview | None) -> dict[str, str]:
    """Returns the shares of rows to hold out, each with a remark that counts the rows."""
    if seen is None or seen.more:
        return dict.fromkeys(
            ("validation", "test"), f"{SHARE} # of all rows; the evaluation needs at least {FEWEST} of them"
        )
    if seen.splits and not seen.shares:
        return {
            split: f"{SHARE} # unused: the list assigns {seen.splits.get(split, 0)}" for split in ("validation", "test")
        }
    rows = len(seen.shares) + sum(seen.splits.values())
    shares, begin, found = sorted(seen.shares), 0.0, {}
    for split, wanted in (("test", TEST), ("validation", VALIDATION)):  # in the order of pipeline.data.source.stage
        listed, most = seen.splits.get(split, 0), int(MOST * rows)
        share = shortest_share(
            [place - begin for place in shares if place >= begin], min(wanted, most) - listed, most - listed
        )
        held_out = listed + sum(begin <= place < begin + share for place in shares)
        found[split] = f"{share} # {held_out} of {counted(rows, 'row')}"
        begin += share
    return found


def shortest_share(places: Sequence[float], wanted: int, most: int) -> float:
    """Returns the shortest share, SHARE or more, below which ``wanted`` to ``most`` of the ``places`` lie.

    ``places`` rise, in [0, 1); those of one group are equal. Where groups are large, fewer than ``wanted`` lie below.
    """
    best = SHARE
    for parts in (100, 1000, 10_000):  # the fewest digits that do
        shares = [part / parts for part in range(round(SHARE * parts), parts + 1)]
        fit = [share for share in shares if bisect_left(places, share) <= most]
        best = max(fit, key=lambda share: min(bisect_left(places, share), wanted), default=best)
        if bisect_left(places, best) >= wanted:
            break
    return best


def _captions(seen: ListPreview | None) -> list[str]:
    """Returns a few captions of the list, or the first words of a long one."""
    if seen is None or not seen.captions:
        return ["a caption like those of your pairs"]
    short = dict.fromkeys(caption for caption in seen.captions if len(caption.encode()) <= CAPTION_BYTES)
    cut = seen.captions[0].encode()[:CAPTION_BYTES].decode(errors="ignore")
    return list(short)[:CAPTIONS] or [cut.rpartition(" ")[0] or cut]


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _scalar(text: str) -> str:
    """Returns a text as YAML reads it back: as it stands where that works, else in quotes."""
    try:
        plain = load_yaml(f"- {text} # remark") == [text]
    except ValueError:
        plain = False
    return text if plain else yaml.safe_dump(text, default_style='"', width=float("inf"), allow_unicode=True).strip()
