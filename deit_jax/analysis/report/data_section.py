"""The section of a report on the data: its parts, its classes, what was left out, twins."""

from collections.abc import Mapping, Sequence
from typing import Any

from deit_jax.analysis.report.comparison import table
from deit_jax.analysis.report.html import Element, element
from deit_jax.data.card import lines

Card = Mapping[str, Any]
MOST = 20  # rows of classes
TWINS = {
    "between": "trained and evaluated on, the same file",
    "near": "trained and evaluated on, looking the same",
    "train": "trained on twice",
}


def content(card: Card) -> list[Element]:
    """Return the section's content from a data card (data/card.py)."""
    parts = [element("p", line) for line in lines(dict(card))]
    parts += [_sizes(card)] if card.get("sizes") else []
    parts += _classes(card["classes"], card["per_class"])
    parts += _twins(card.get("twins") or {})
    return parts


def _sizes(card: Card) -> Element:
    shorter, longer = card["sizes"]["shorter"], card["sizes"]["longer"]
    kinds = ", ".join(f"{n} {name}" for name, n in {**card["formats"], **card["modes"]}.items())
    text = "Pixels, smallest, middle and largest: shorter side {}, {}, {}; longer side {}, {}, {}. "
    return element("p", text.format(*shorter, *longer) + f"{kinds}.")


def _classes(names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> list[Element]:
    """Return a table of the classes, those with the fewest images to train on first."""
    if "train" not in counts:
        return []
    order = sorted(range(len(names)), key=lambda i: counts["train"][i])[:MOST]
    held = counts.get("eval")
    rows = [_row(names[i], counts["train"][i], held[i] if held else "not counted") for i in order]
    text = "Images of each class" if len(order) == len(names) else "Images of the smallest classes"
    return [element("p", f"{text}:"), table(["class", "trained on", "evaluated on"], rows, "list")]


def _row(*cells) -> Element:
    return element("tr", [element("td", str(cell)) for cell in cells])


def _twins(found: Mapping[str, Any]) -> list[Element]:
    rows = [
        _row(what, *pair)
        for kind, what in TWINS.items()
        if kind in found
        for pair in found[kind]["shown"]
    ]
    if not rows:
        return []
    text = "Images that are there twice, the first of each kind:"
    return [element("p", text), table(["how", "one", "the other"], rows, "list")]
