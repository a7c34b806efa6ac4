"""Draws monsters, potted plants and planets from named parts, and says in words what was drawn.

The figures are DiceBear's styles critters, sprouts and planets (CC0), of which only what a person tells apart and can
name at 64 px is left. Every part of a drawing is chosen by name, so a drawing is a pure function of its parts, and the
same drawing with one part changed can be drawn too: what a model should have drawn is known for every caption.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from pipeline.errors import UserError, install

if TYPE_CHECKING:
    from dicebear import Style

VERSION = 2  # raise it when pixels, parts or captions change
HOST = "drawings.test"
SIDES = (256, 1024)
PACKAGES = {"dicebear": "dicebear-core", "dicebear_styles": "dicebear-styles", "resvg_py": "resvg-py"}


class Value(NamedTuple):
    """Holds what a part may be: DiceBear's variant or colour ("" draws nothing), its word, and other words for it."""

    option: str
    word: str
    other: str


def _values(*rows: tuple[str, ...]) -> dict[str, Value]:
    """Returns values by name from names, options, words and, where there are any, other words."""
    return {name: Value(option, words[0], words[-1]) for name, option, *words in rows}


def _only(values: dict[str, Value], names: str) -> dict[str, Value]:
    return {name: values[name] for name in names.split()}


_COLOURS = _values(
    ("skyblue", "#7dd3fc", "sky blue"),
    ("lilac", "#c4b5fd", "lilac"),
    ("pink", "#f0abfc", "pink"),
    ("red", "#f87171", "red"),
    ("orange", "#fb923c", "orange"),
    ("yellow", "#fde047", "yellow"),
    ("lime", "#a3e635", "lime"),
    ("turquoise", "#2dd4bf", "turquoise"),
)
_GROUNDS = _values(
    ("blue", "#1d4ed8", "blue", "a blue background"),
    ("magenta", "#a21caf", "magenta", "a magenta background"),
    ("crimson", "#be123c", "crimson", "a crimson background"),
    ("brown", "#92400e", "brown", "a brown background"),
    ("green", "#047857", "green", "a green background"),
    ("black", "#18181b", "black", "a black background"),
)
_EYES = _values(
    ("round", "round", "round eyes", "wide open eyes"),
    ("dots", "dots", "dots for eyes", "beady eyes"),
    ("one", "mono", "one eye", "a single eye"),
    ("three", "trio", "three eyes"),
    ("happy", "happy", "happy eyes", "eyes that laugh"),
    ("wink", "wink", "a wink", "a winking eye"),
    ("sleepy", "sleepy", "sleepy eyes", "tired eyes"),
    ("angry", "angry", "angry eyes", "an angry look"),
)
_MOUTHS = _values(
    ("smile", "smile", "a smile", "a smiling mouth"),
    ("grin", "grin", "a grin", "a big grin"),
    ("frown", "frown", "a frown", "a sad mouth"),
    ("line", "line", "a straight mouth", "a flat mouth"),
    ("open", "open", "an open mouth", "a mouth wide open"),
    ("wavy", "wavy", "a wavy mouth", "a wobbly mouth"),
    ("teeth", "teeth", "teeth", "big teeth"),
)

# Parts by style, in the order in which a URL names them; values by name.
PARTS: dict[str, dict[str, dict[str, Value]]] = {
    "critters": {
        "body": _values(
            ("domed", "dome", "domed", "dome-shaped"),
            ("square", "block", "square", "box-shaped"),
            ("tall", "tower", "tall", "tall and narrow"),
            ("blobby", "blob", "blobby", "lumpy"),
            ("bell", "bell", "bell-shaped"),
            ("funnel", "wedgeInv", "funnel-shaped", "top-heavy"),
            ("stepped", "steps", "stepped", "step-shaped"),
        ),
        "colour": _COLOURS,
        "ground": _GROUNDS,
        "top": _values(
            ("horns", "horns", "horns", "two horns"),
            ("antenna", "antenna", "an antenna", "one antenna"),
            ("antennae", "antennae", "two antennae", "a pair of antennae"),
            ("roundears", "earsRound", "round ears", "ears like balls"),
            ("pointedears", "earsPointy", "pointed ears", "ears like a cat"),
            ("spikes", "spikes", "spikes", "three spikes"),
            ("crown", "crown", "a crown"),
            ("sprout", "sprout", "a sprout", "two leaves"),
        ),
        "eyes": _EYES,
        "mouth": _MOUTHS,
    },
    "sprouts": {
        "plant": _values(
            ("cactus", "cactus", "a cactus"),
            ("ball", "ball", "a round cactus", "a ball cactus"),
            ("succulent", "succulent", "a succulent", "an aloe"),
            ("bush", "bush", "a bush", "a little tree"),
            ("tall", "tall", "a tall plant", "a tall stem"),
            ("flower", "flower", "a flower"),
            ("tulip", "tulip", "a tulip"),
            ("palm", "palm", "a palm", "a palm tree"),
        ),
        "pot": _values(
            ("straight", "cylinder", "straight pot", "pot with straight sides"),
            ("bowl", "bowl", "bowl"),
            ("tub", "tub", "tub", "wide tub"),
            ("round", "round", "round pot", "pot like a ball"),
            ("rimmed", "rim", "rimmed pot", "pot with a rim"),
        ),
        "colour": _COLOURS,
        "ground": _GROUNDS,
        "eyes": _only(_EYES, "round dots happy wink sleepy angry"),
        "mouth": _only(_MOUTHS, "smile grin frown line open wavy"),
    },
    "planets": {
        "surface": _values(
            ("plain", "", "plain", "smooth"),
            ("banded", "banded", "banded", "striped"),
            ("cratered", "cratered", "cratered"),
            ("capped", "cap", "ice-capped"),
            ("terra", "terra", "earth-like"),
        ),
        "colour": _values(
            ("pink", "#f472b6", "pink"),
            ("red", "#ef4444", "red"),
            ("orange", "#fb923c", "orange"),
            ("yellow", "#facc15", "yellow"),
            ("green", "#22c55e", "green"),
            ("turquoise", "#2dd4bf", "turquoise"),
            ("blue", "#3b82f6", "blue"),
            ("purple", "#a78bfa", "purple"),
        ),
        "ground": _GROUNDS,
        "ring": _values(
            ("none", "", "no ring"),
            ("thin", "thin", "a thin ring", "a narrow ring"),
            ("broad", "bold", "a broad ring", "a wide ring"),
        ),
        "moon": _values(
            ("none", "", "no moon"),
            ("one", "one", "one moon", "a single moon"),
            ("two", "two", "two moons", "a pair of moons"),
        ),
    },
}
# A style's component or colour for each part whose name differs.
_COMPONENTS = {
    "critters": {"colour": "body", "ground": "background"},
    "sprouts": {"colour": "pot", "ground": "background"},
    "planets": {"colour": "planet", "ground": "background", "moon": "moons"},
}
# What no caption names is the same in every drawing: components, colours, and what DiceBear would turn or shift.
_FIXED_COMPONENTS: dict[str, dict[str, str]] = {
    "critters": {},
    "sprouts": {},
    "planets": {"planet": "disc", "shade": "soft"},
}
_FIXED_COLOURS: dict[str, dict[str, str]] = {
    "critters": {"accent": "#f8fafc", "ink": "#1e293b"},
    "sprouts": {"plant": "#22c55e", "bloom": "#f9a8d4", "ink": "#1e293b"},
    "planets": {"moon": "#f8fafc"},
}
# Faces as large as the figures allow, because a network sees them at 32 and 64 px. Shifts are in percent of the part.
_POSES: dict[str, dict[str, dict[str, float]]] = {
    "critters": {"top": {"scale": 1.1}, "eyes": {"scale": 1.05}, "mouth": {"scale": 1.35, "y": 10}},
    "sprouts": {"plant": {"scale": 0.72, "y": 10}, "mouth": {"scale": 1.3, "y": 15}},
    "planets": {"surface": {"rotate": 0}, "ring": {"rotate": -18}, "moons": {"scale": 1.35}},
}
_LARGER = {
    "crown": "translate(-6 -17) scale(1.25 1.5)",
    "spikes": "translate(-10 -2) scale(1.4 1)",
}  # or bodies hide them
# Factors by component and attribute, for shapes that are too faint at 64 px.
_STRONGER = {"surface": {"fill-opacity": 2.5}, "ring": {"stroke-opacity": 1.7, "stroke-width": 1.5}}
_FRAMES = {
    "critters": {"scale": 1.2, "translateY": 12},
    "sprouts": {"scale": 1.28, "translateY": -11},
    "planets": {"scale": 1.08},
}

# The captions of a drawing: a hash of it picks one of each group. The first group says everything. The others name
# shapes and no colours: with colours among them a small CLIP learns colours and stops, and what none of them names it
# never sees. {top} is a value's word, {top2} its other word.
CAPTIONS = {
    "critters": (
        (
            "a {body} {colour} monster with {top}, {eyes} and {mouth}, on {ground}",
            "a {colour} {body} monster on {ground} with {eyes}, {mouth} and {top}",
            "a monster with {mouth}, {eyes} and {top}, {body} and {colour}, on {ground2}",
        ),
        ("a {body} monster with {top}",),
        ("a monster with {eyes} and {mouth}",),
        (
            "a creature that has {mouth2} and {top2}",
            "{eyes2} and {top2} on a {body2} creature",
            "a {body2} creature with {mouth2} and {eyes2}",
        ),
    ),
    "sprouts": (
        (
            "{plant} in a {colour} {pot} with {eyes} and {mouth}, on {ground}",
            "a {colour} {pot} with {mouth} and {eyes}, holding {plant}, on {ground2}",
            "on {ground2}, {plant} that grows in a {colour} {pot} with {eyes} and {mouth}",
        ),
        ("{plant} in a {pot}",),
        ("a plant pot with {eyes} and {mouth}",),
        (
            "a {pot2} that has {mouth2}, with {plant2}",
            "{plant2} above {eyes2}",
            "a {pot2} with {eyes2} and {mouth2}",
        ),
    ),
    "planets": (
        (
            "a {surface} {colour} planet with {ring} and {moon}, on {ground}",
            "a {colour} planet on {ground2}, {surface}, with {moon} and {ring}",
        ),
        ("a {surface} planet with {ring}",),
        ("a planet with {moon} and {ring}",),
        ("a {surface2} world and {moon2}", "{ring2} around a {surface2} world"),
    ),
}


@dataclass(frozen=True)
class Drawing:
    """Holds a drawing: a style, and the name of a value for each of its parts, in the order of ``PARTS[style]``.

    Raises LookupError for a style, or a value of a part, that does not exist.
    """

    style: str
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        parts = PARTS.get(self.style, {})
        if len(parts) != len(self.values) or any(
            v not in known for v, known in zip(self.values, parts.values(), strict=True)
        ):
            raise LookupError(f"{self.style}/{'-'.join(self.values)}: no such drawing")

    @property
    def parts(self) -> dict[str, str]:
        """Returns the name of the value of each part."""
        return dict(zip(PARTS[self.style], self.values, strict=True))

    def replaced(self, part: str, value: str) -> Drawing:
        """Returns the same drawing with another value of one part."""
        return Drawing(self.style, tuple({**self.parts, part: value}.values()))


def captions(drawing: Drawing) -> tuple[str, ...]:
    """Returns the captions of a drawing, the whole one first, and again, in another order, last.

    Where one caption of four names colours, CLIP's embeddings lose them; where more than every second does, shapes.
    """
    words = {}
    for part, name in drawing.parts.items():
        words[part], words[f"{part}2"] = PARTS[drawing.style][part][name][1:]

    def pick(number: int, phrasings: Sequence[str]) -> str:
        return phrasings[int(hash_fraction("caption", str(number), drawing.style, *drawing.values) * len(phrasings))]

    groups = CAPTIONS[drawing.style]
    said = [pick(number, phrasings) for number, phrasings in enumerate(groups)]
    said.append(pick(len(groups), [phrasing for phrasing in groups[0] if phrasing != said[0]]))
    return tuple(re.sub(r"\ba (?=[aeiou])", "an ", phrasing.format(**words)) for phrasing in said)


def hash_fraction(*what: str) -> float:
    """Returns a number in [0, 1) that depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256("/".join(what).encode()).digest()[:6], "big") / 2**48


def drawing_url(drawing: Drawing, side: int) -> str:
    """Returns the address of a drawing, from which ``drawing_of`` reads it back."""
    return f"http://{HOST}/{side}/{drawing.style}/{'-'.join(drawing.values)}.png"


def drawing_of(url: str) -> tuple[Drawing, int]:
    """Returns the drawing and its side in pixels that a URL or its path names. Raises LookupError if it names none."""
    match = re.fullmatch(rf"(?:http://{re.escape(HOST)})?/([0-9]{{1,5}})/([a-z]+)/([a-z-]+)\.png", url)
    if not match or int(match[1]) not in SIDES:
        raise LookupError(f"{url}: no such drawing")
    return Drawing(match[2], tuple(match[3].split("-"))), int(match[1])


def draw(drawing: Drawing, side: int) -> Image.Image:
    """Returns the drawing as an RGB image of side x side pixels. Raises UserError if a package is missing."""
    return Image.open(io.BytesIO(draw_png(drawing, side))).convert("RGB")


def draw_png(drawing: Drawing, side: int) -> bytes:
    """Returns the drawing as an opaque PNG of side x side pixels. Raises UserError if a package is missing."""
    style = _style(drawing.style)
    import resvg_py
    from dicebear import Avatar

    options: dict[str, Any] = {"seed": "drawing", "size": side, **_FRAMES[drawing.style]}
    for part, name in drawing.parts.items():
        option = PARTS[drawing.style][part][name].option
        component = _COMPONENTS[drawing.style].get(part, part)
        if not option:
            options[f"{component}Probability"] = 0
        else:
            options[f"{component}{'Color' if option.startswith('#') else 'Variant'}"] = [option]
    svg = Avatar(style, options).to_string()
    # resvg paints a layer for each opacity, though a shape without a stroke needs none, and for a clip to the canvas,
    # which changes nothing. Without these layers it takes half the time.
    svg = re.sub(r' clip-path="url\(#clip-[0-9a-f]+\)"', "", svg)
    svg = re.sub(r'(<path[^>]*?) opacity="', r'\1 fill-opacity="', svg)
    # System fonts are not needed, and would make every drawing wait for them.
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))


@cache
def _style(name: str) -> Style:
    """Returns DiceBear's style with nothing left to chance. Its validation takes about a second."""
    require_packages()
    from dicebear import Style

    definition = json.loads(importlib.resources.files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8"))
    used = {component: {variant} for component, variant in _FIXED_COMPONENTS[name].items()}
    for part, values in PARTS[name].items():
        if not any(each.option.startswith("#") for each in values.values()):
            used[_COMPONENTS[name].get(part, part)] = {each.option for each in values.values()}
    components = {}
    for component, data in definition["components"].items():
        variants = {key: drawn for key, drawn in data.get("variants", {}).items() if key in used.get(component, ())}
        for key in _LARGER.keys() & variants:
            attributes = {"transform": _LARGER[key]}
            whole = {"type": "element", "name": "g", "attributes": attributes, "children": variants[key]["elements"]}
            variants[key] = {"elements": [whole]}
        for attribute, times in _STRONGER.get(component, {}).items():
            variants = _stronger(variants, attribute, times)
        if variants:  # cheeks, patterns, stars and animations go
            pose = _POSES[name].get(component, {})
            exact = {key: {"min": value, "max": value} for key, value in pose.items()}
            shift = {axis: exact.pop(axis) for axis in ("x", "y") if axis in exact}
            size = {"width": data["width"], "height": data["height"], "probability": 100}
            components[component] = {**size, **exact, **({"translate": shift} if shift else {}), "variants": variants}
    definition["components"] = components
    for colour, value in _FIXED_COLOURS[name].items():
        definition["colors"][colour] = {"values": [value]}
    return Style(definition)


def _stronger(variants: dict[str, Any], attribute: str, times: float) -> dict[str, Any]:
    """Returns variants whose shapes have that many times the attribute; an opacity is at most 1."""
    most = 1.0 if attribute.endswith("opacity") else math.inf
    return json.loads(
        re.sub(
            rf'"{attribute}": "([0-9.]+)"',
            lambda found: f'"{attribute}": "{min(most, times * float(found[1])):.2f}"',
            json.dumps(variants),
        )
    )


def require_packages() -> None:
    """Raises UserError if a package of the ``demo`` extra is missing."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"the drawings need {', '.join(missing)}: {install('demo')}")
