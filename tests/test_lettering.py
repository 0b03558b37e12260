"""Names of any script in pictures: drawn with fonts that have them, or escaped; never formulas."""

import json
import types

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.text import Text
from PIL import Image

from deit_jax.analysis import input_sheet
from deit_jax.train import lettering, picture

NAMES = {
    "chinese": "中文猫",
    "japanese": "ネコと日本",
    "korean": "고양이",
    "arabic": "قطة سوداء",
    "devanagari": "बिल्ली",
    "emoji": "cat 🐈‍⬛ 😀️",
    "control": "a\x07b\tc\nd\x7fe\x00",
    "direction": "abc\u202efed\u2028x",
    "no utf-8": "caf\udce9",
    "dollars": r"$\frac{1}{0}$ 5$ and $^$",
    "backslash": "C:\\new_table",
    "private": "\ue000\U0010fffe",
    "latin": "Écureuil ß",
}
FAMILY = "Letters of a test"


@pytest.fixture(autouse=True)
def fresh():
    """Look for fonts anew."""
    lettering._families.cache_clear()
    lettering._family_of.cache_clear()
    yield
    lettering._families.cache_clear()
    lettering._family_of.cache_clear()


@pytest.fixture
def chinese_font(tmp_path):
    """Install a font with three Chinese characters, one of them without an outline."""
    characters = {"one": "中", "two": "文", "empty": "猫"}
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 700), (500, 700), (500, 0)):
        pen.lineTo(point)
    pen.closePath()
    square, nothing = pen.glyph(), TTGlyphPen(None).glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *characters])
    builder.setupCharacterMap({ord(sign): name for name, sign in characters.items()})
    glyphs = {".notdef": square, "one": square, "two": square, "empty": nothing}
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (600, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": FAMILY, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    path = tmp_path / "letters.ttf"
    builder.save(path)
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(path)
    yield
    font_manager.fontManager.ttflist[:] = before


@pytest.fixture
def drawn(monkeypatch, caplog):
    """Return the texts of the pictures that are drawn, with the fonts that matplotlib takes."""
    found = []

    def close(figure):
        for text in figure.findobj(Text):
            if text.get_parse_math():  # figures of the axes, and our own words
                assert text.get_text().replace("\u2212", "-").isascii()
                assert "$" not in text.get_text()
            elif text.get_text():
                manager = font_manager.fontManager
                files = manager._find_fonts_by_props(text.get_fontproperties())
                found.append((text.get_text(), [font_manager.get_font(file) for file in files]))

    monkeypatch.setattr(plt, "close", close)
    yield found
    assert not [r for r in caplog.records if r.name.startswith("matplotlib")]


def check_covered(drawn):
    """Assert that each character has a glyph in one of the fonts of its text."""
    for text, fonts in drawn:
        maps = [font.get_charmap() for font in fonts]
        for sign in text:
            if sign != "\n":
                assert any(ord(sign) in known for known in maps), (text, sign)


def sheet(tmp_path, titles, suffix=".png"):
    images = np.zeros((len(titles), 4, 4, 3), np.uint8)
    path = tmp_path / f"sheet{suffix}"
    input_sheet.draw(images, titles, f"folder:/{titles[0]}: the model's input", path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_a_sheet_of_names_of_any_script_has_a_letter_for_each(tmp_path, drawn, suffix):
    titles = [*NAMES.values(), f"{NAMES['chinese']} 0.70 + {NAMES['dollars']} 0.30"]
    assert sheet(tmp_path, titles, suffix).stat().st_size > 1000
    assert len(drawn) == len(titles) + 1
    check_covered(drawn)


def test_what_no_font_has_is_told_by_number(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(lettering, "_families", list)  # matplotlib's DejaVu Sans alone
    sheet(tmp_path, [NAMES[k] for k in ("chinese", "control", "no utf-8", "emoji", "direction")])
    check_covered(drawn)
    said = [text for text, _ in drawn if "folder" not in text]
    assert r"\u4e2d\u6587\u732b" in said
    assert r"a\u0007b\u0009c\u000ad…" in said
    assert r"caf\udce9" in said
    assert "cat \\U0001f408\u200d\\u2b1b 😀\ufe0f" in said
    assert r"abc\u202efed\u2028x" in said
    assert lettering.spelled("a\U0010fffe") == r"a\U0010fffe"


def test_a_font_that_is_installed_draws_them(tmp_path, drawn, chinese_font, monkeypatch):
    monkeypatch.setattr(lettering, "_families", lambda: [FAMILY])
    sheet(tmp_path, ["猫: 中文"])
    check_covered(drawn)
    said, fonts = drawn[0] if "folder" not in drawn[0][0] else drawn[1]
    assert said == r"\u732b: 中文"  # of 猫 it has only an empty outline
    assert FAMILY in {font.family_name for font in fonts}
    assert lettering.style("cat")["family"] == matplotlib.rcParams["font.family"]


def test_an_installed_font_is_found_among_all(chinese_font):
    assert FAMILY in lettering._families()
    own = {"cmr10", "STIXGeneral", "Last Resort High-Efficiency"}
    assert not own & set(lettering._families())
    assert lettering.spelled("文") == "文"


def test_a_name_is_cut_between_letters_and_not_inside_a_number(monkeypatch):
    monkeypatch.setattr(lettering, "_families", list)
    assert lettering.spelled("中文猫", 14) == r"\u4e2d\u6587"
    assert lettering.spelled("a long name of a class", 14) == "a long name of"
    assert lettering.spelled("") == ""


def test_dollars_are_no_formula(tmp_path, drawn):
    sheet(tmp_path, [NAMES["dollars"]])
    assert all(text.count("$") == 5 for text, _ in drawn)


def a_trainer(tmp_path, classes):
    """Return what a picture needs of a finished run."""
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": 1.0, "eval/cls.top1": 5})
    )
    image = np.zeros((4, 4, 3), np.uint8)
    dataset = types.SimpleNamespace(classes=classes, eval=range(len(classes)))
    return types.SimpleNamespace(
        experiment=types.SimpleNamespace(
            name="deit", data=types.SimpleNamespace(source=f"folder:/{classes[0]}/$x$")
        ),
        dataset=dataset,
        evaluator=types.SimpleNamespace(read=lambda i: (image, np.int64(i))),
        figure=("top1", "top-1"),
        teacher=None,
        workdir=tmp_path,
    )


@pytest.mark.parametrize("several", [False, True])
def test_a_runs_picture_has_a_letter_for_each(tmp_path, drawn, monkeypatch, several):
    classes = list(NAMES.values())
    labels = np.arange(len(classes))
    answers = labels[:, None] == labels if several else labels
    monkeypatch.setattr(picture, "answer", lambda trainer, images: {"student": answers})
    picture.draw(a_trainer(tmp_path, classes), {}, tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").size == (1600, 750)
    check_covered(drawn)
    assert sum(text.startswith("model: ") for text, _ in drawn) == len(classes)
