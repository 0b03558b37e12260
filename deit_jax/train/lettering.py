"""Names of any script in matplotlib's pictures: with a font that has the letters, or escaped."""

import functools
import unicodedata
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager

_JOINERS = "\u200c\u200d"  # between letters; other characters that only steer are shown by number
_NO_LETTERS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_BOXES = "last resort"  # fonts that have a box for every character


def spelled(name: str, limit: int | None = None) -> str:
    r"""Return a name as it can be drawn, cut to so many characters.

    What no installed font has, and what breaks or turns a line, becomes its number: `\u4e2d`.
    """
    parts, room = [], len(name) * 10 if limit is None else limit
    for sign in name:
        part = sign if _family_of(sign) is not None else _number(sign)
        room -= len(part)
        if room < 0:
            break
        parts.append(part)
    return "".join(parts)


def style(text: str) -> dict[str, Any]:
    """Return the arguments that draw a text as it is: its fonts, and no formulas between dollars.

    Text is `spelled` names, and words and line breaks between them.
    """
    families = dict.fromkeys(family for sign in text if (family := _family_of(sign)))
    default = matplotlib.rcParams["font.family"]
    return {"family": [*default, *families], "parse_math": False}


def _number(sign: str) -> str:
    return f"\\u{ord(sign):04x}" if ord(sign) < 2**16 else f"\\U{ord(sign):08x}"


@functools.cache
def _family_of(sign: str) -> str | None:
    """Return the family whose font draws a character, "" for the usual one, None without any."""
    if unicodedata.category(sign) in _NO_LETTERS and sign not in _JOINERS:
        return None
    properties = font_manager.FontProperties()
    if font_manager.get_font(font_manager.findfont(properties)).get_char_index(ord(sign)):
        return ""
    return next((family for family in _families() if _has(family, sign)), None)


@functools.cache
def _families() -> list[str]:
    """Return the installed families, those without serifs first; matplotlib's own are for maths."""
    own = Path(matplotlib.get_data_path())
    found = font_manager.fontManager.ttflist
    # Of a family without its usual weight matplotlib takes another, and says so each time.
    usual = (f for f in found if f.weight in (400, "normal") and f.style == "normal")
    names = {font.name for font in usual if own not in Path(font.fname).parents}
    usable = (name for name in names if _BOXES not in name.lower())
    return sorted(usable, key=lambda name: ("sans" not in name.lower(), name))


def _has(family: str, sign: str) -> bool:
    """Return whether the font that matplotlib takes for a family has an outline of a character."""
    try:
        properties = font_manager.FontProperties(family=[family])
        font = font_manager.get_font(font_manager.findfont(properties, fallback_to_default=False))
        if not font.scalable or not font.get_char_index(ord(sign)):
            return False
        glyph = font.load_char(ord(sign))
    except (OSError, RuntimeError, ValueError):  # pictures instead of outlines, a damaged file
        return False
    return sign.isspace() or glyph.width > 0
