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
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from pipeline.errors import UserError, install

if TYPE_CHECKING:
    from dicebear import Style

VERSION = 4  # raise it when pixels, parts or captions change; it is in the URLs, so that images are fetched again
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
    ("round", "round", "round eyes", "wide eyes"),
    ("dots", "dots", "dots for eyes", "beady eyes"),
    ("one", "mono", "one eye", "a single eye"),
    ("three", "trio", "three eyes"),
    ("happy", "happy", "happy eyes", "laughing eyes"),
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
            ("tall", "tower", "tall", "narrow"),
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
            ("antennae", "antennae", "two antennae", "two feelers"),
            ("roundears", "earsRound", "round ears", "ball ears"),
            ("pointedears", "earsPointy", "pointed ears", "cat ears"),
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
            ("ball", "ball", "a barrel cactus"),  # "a round cactus" has the words of a cactus in a round pot
            ("succulent", "succulent", "a succulent", "an aloe"),
            ("bush", "bush", "a bush", "a little tree"),
            ("tall", "tall", "a tall plant", "a tall stem"),
            ("flower", "flower", "a flower"),
            ("tulip", "tulip", "a tulip"),
            ("palm", "palm", "a palm", "a palm tree"),
        ),
        "pot": _values(
            ("straight", "cylinder", "straight pot", "straight-sided pot"),
            ("bowl", "bowl", "bowl"),
            ("tub", "tub", "tub", "wide tub"),
            ("round", "round", "round pot", "ball-shaped pot"),
            ("rimmed", "rim", "rimmed pot", "thick-rimmed pot"),
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
_STRONGER = {"surface": {"fill-opacity": 3.5}, "ring": {"stroke-opacity": 1.7, "stroke-width": 1.5}}
_FRAMES = {
    "critters": {"scale": 1.2, "translateY": 12},
    "sprouts": {"scale": 1.28, "translateY": -11},
    "planets": {"scale": 1.08},
}

# What a caption is made of, by style: the noun, the parts that are adjectives, and the parts that follow "with".
_NOUNS = {"critters": ("monster", "creature"), "sprouts": ("plant pot",), "planets": ("planet", "world")}
_ADJECTIVES = {"critters": ("body", "colour"), "sprouts": ("colour",), "planets": ("surface", "colour")}
_FEATURES = {"critters": ("top", "eyes", "mouth"), "sprouts": ("eyes", "mouth"), "planets": ("ring", "moon")}
# Short captions name shapes and no colours: a small CLIP learns colours by itself, and what no short one names it never
# sees.
_SHORT = {
    "critters": (("body", "top"), ("eyes", "mouth")),
    "sprouts": (("plant", "pot"), ("eyes", "mouth")),
    "planets": (("surface", "ring"), ("ring", "moon")),
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
    """Returns the captions of a drawing: two that say everything, two of shapes, and two of shapes or any parts.

    A hash of the drawing chooses words, order and sentence, so that models learn what a word means wherever it stands.
    """
    parts = list(drawing.parts)
    shapes = [part for part in parts if part not in ("colour", "ground")]
    rng = random.Random(drawing_url(drawing, 0))
    some = rng.sample(parts, rng.randrange(1, len(parts))) if rng.random() < 1 / 2 else rng.sample(shapes, 2)
    named = (parts, parts, *_SHORT[drawing.style], rng.sample(shapes, 2), some)
    return tuple(_caption(drawing, which, rng, 1 / 3 if place else 1 / 8) for place, which in enumerate(named))


def _caption(drawing: Drawing, named: Sequence[str], rng: random.Random, others: float) -> str:
    """Returns a caption that names these parts of a drawing, a share ``others`` of them by their other words."""
    style = drawing.style

    def words(parts: Sequence[str]) -> list[str]:
        values = [PARTS[style][part][drawing.parts[part]] for part in parts if part in named]
        return rng.sample([value.other if rng.random() < others else value.word for value in values], len(values))

    adjectives, features = words(_ADJECTIVES[style]), _listed(words(_FEATURES[style]))
    (noun,) = words(["pot"]) or [rng.choice(_NOUNS[style])]
    plant, ground = _listed(words(["plant"])), _listed(words(["ground"]))
    described = " ".join(["a", *adjectives, noun])
    subject = f"{plant} in {described}" if plant else described
    if style == "sprouts":
        reversed_ = (("", described), (" with ", features), (", holding ", plant), (", on ", ground))
    else:
        reversed_ = (("a ", noun), (" with ", features), (", ", _listed(adjectives)), (", on ", ground))
    colour = ground.removeprefix("a ").removesuffix(" background")
    sentences: tuple[tuple[tuple[str, str], ...], ...] = (
        (("", subject), (" with ", features), (", on ", ground)),
        (("", subject), (" on ", ground), (" with ", features)),
        (("on ", ground), (", ", subject), (" with ", features)),
        (("", subject), (" that has ", features), (", on ", ground)),
        (("a drawing of ", subject), (". It has ", features), (". The background is ", colour)),
        reversed_,
    )
    said = "".join(before + what for before, what in rng.choice(sentences) if what).removeprefix(", ")
    return re.sub(r"\ba (?=[aeiou])", "an ", said)


def _listed(words: Sequence[str]) -> str:
    """Returns "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def hash_fraction(*what: str) -> float:
    """Returns a number in [0, 1) that depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256("/".join(what).encode()).digest()[:6], "big") / 2**48


def drawing_url(drawing: Drawing, side: int) -> str:
    """Returns the address of a drawing, from which ``drawing_of`` reads it back."""
    return f"http://{HOST}/v{VERSION}/{side}/{drawing.style}/{'-'.join(drawing.values)}.png"


def drawing_of(url: str) -> tuple[Drawing, int]:
    """Returns the drawing and its side in pixels that a URL or its path names. Raises LookupError if it names none."""
    match = re.fullmatch(rf"(?:http://{re.escape(HOST)})?/v{VERSION}/([0-9]{{1,5}})/([a-z]+)/([a-z-]+)\.png", url)
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
