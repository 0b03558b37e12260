"""The part of the page that one model has: the image, answers, and where its tokens look."""

from collections.abc import Sequence

import numpy as np

from deit_jax.analysis.report.html import LARGE, Element, data_uri, element, heat
from deit_jax.demo import answers, pictures
from deit_jax.demo.models import TOKENS, Look, Model
from deit_jax.shapes import text

NAMES = {"cls": "class token", "dist": "distillation token"}
SEEN = {
    "crop": "its middle, after resizing",
    "squash": "all of it, squashed",
    "pad": "all of it, in a frame",
}
NO_MAPS = "This model is a convnet: it has no tokens, and no attention to show."
ONE_TOKEN = (
    "This model has no distillation token: there is one answer, and the class token's attention."
)
NO_HEAD = "This model has a distillation token without a head: one answer, and two tokens to see."


def section(model: Model, look: Look, name: str, block: int, topk: int, truth: str) -> Element:
    """Return all that is said of an image by one model; `block` counts from 1."""
    photo = pictures.photograph(look.pixels)
    parts: list = [
        element("h2", model.title),
        element("p", facts(model), class_="faint"),
        element("p", model.note, class_="note") if model.note else None,
        answers.verdict(model, look, truth),
        element(
            "div", _photo(model, look, photo, name), answers.bars(model, look, topk), class_="top"
        ),
    ]
    if look.rollout is None:
        parts.append(element("p", NO_MAPS, class_="note"))
    else:
        if len(look.rollout) == 1:
            parts.append(element("p", ONE_TOKEN, class_="note"))
        elif "dist" not in look.probabilities:
            parts.append(element("p", NO_HEAD, class_="note"))
        parts += [*_rollout(look), *_heads(look, min(max(block, 1), model.depth))]
    return element("section", parts, class_="model", style=f"--photo:url({photo})")


def facts(model: Model) -> str:
    """Return in one line what a model is."""
    opened = model.opened
    about = [opened.name, f"{len(opened.classes)} classes", f"{text(opened.image_size)} px"]
    about += [f"{model.depth} blocks"] if model.depth else []
    about += [f"teacher: {model.teacher_name}"] if model.teacher_name else []
    return " · ".join(about)


def _photo(model: Model, look: Look, photo: str, name: str) -> Element:
    small = "pixels" if max(look.pixels.shape) <= LARGE else None
    height, width = look.pixels.shape[:2]
    how = SEEN[model.opened.reading.resize]
    caption = element(
        "figcaption",
        element("b", "What the model saw"),
        f" of {name}: {how}, {width} x {height} px.",
    )
    image = element("img", src=photo, alt="the image as the model saw it", class_=small)
    return element("figure", image, caption, class_="photo")


def _rollout(look: Look) -> list[Element]:
    assert look.rollout is not None  # `section` asks only then
    figures = [
        _figure(_heat(grid), f"{NAMES[token]}, attention through all blocks", NAMES[token], token)
        for grid, token in zip(look.rollout, TOKENS, strict=False)
    ]
    words = "How much of each patch a token consists of in the end (attention rollout). "
    words += "Violet: nothing; yellow: the most. "
    if len(figures) == 2:
        first, second = look.rollout
        legend = [element("span", "blue", class_="cls"), ": the class token reads more; "]
        most = pictures.largest_difference(first, second)
        legend += [element("span", "orange", class_="dist"), ": the distillation token does. "]
        share = f"{100 * most:.2g}" if most > 1e-5 else "less than 0.001"
        legend += [f"Full colour: {share} % of all that it reads."]
        shown = data_uri(pictures.difference(first, second))
        figures.append(_figure(shown, "where the tokens disagree", legend, "difference"))
        words += (
            f"The two maps share {100 * pictures.overlap(first, second):.1f} % of what they read, "
            f"with a cosine of {pictures.cosine(first, second):.3f}; the tokens leave the last "
            f"block with a cosine of {look.cosine:.2f}."
        )
    title = "Where the tokens look, and where they disagree"
    return [
        element("h3", title if len(figures) > 1 else "Where the token looks"),
        element("p", words, class_="faint words"),
        element("div", figures, class_="maps"),
    ]


def _figure(picture: str, alt: str, caption: str | Sequence, kind: str) -> Element:
    image = element("img", src=picture, alt=alt, class_="pixels")
    over = element("div", image, class_=f"over {kind}")
    return element("figure", over, element("figcaption", caption))


def _heads(look: Look, block: int) -> list[Element]:
    assert look.heads is not None  # `section` asks only then
    of_block = look.heads[block - 1]
    rows = []
    for t, token in enumerate(TOKENS[: of_block.shape[1]]):
        maps = [
            _figure(
                _heat(of_block[i, t]),
                f"{NAMES[token]}, block {block}, head {i + 1}",
                f"head {i + 1}",
                "head",
            )
            for i in range(len(of_block))
        ]
        name = element("h4", element("span", class_="dot"), NAMES[token])
        rows.append(
            element("div", name, element("div", maps, class_="heads"), class_=f"row {token}")
        )
    return [element("h3", f"Each head of block {block} of {len(look.heads)}"), *rows]


def _heat(grid: np.ndarray) -> str:
    return data_uri(heat(grid, 0.0, float(grid.max())))
