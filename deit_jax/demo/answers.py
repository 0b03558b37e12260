"""What heads and teacher say of an image, as bars and in one sentence."""

from collections.abc import Mapping, Sequence

import numpy as np

from deit_jax.analysis.report.html import Element, element
from deit_jax.demo.models import Look, Model

NAMES = {
    "cls": "class head",
    "dist": "distillation head",
    "fused": "both heads together",
    "teacher": "teacher",
}
HALF = 0.5  # from which on a class counts as found, where an image may have several


def order_of(probabilities: np.ndarray, topk: int) -> list[int]:
    """Return the numbers of the most probable classes, as `deit predict` orders them."""
    return np.argsort(-probabilities, kind="stable")[:topk].tolist()


def told(look: Look) -> dict[str, np.ndarray]:
    """Return the answers that are different ones: with one head, that is also the fused answer."""
    single = "dist" not in look.probabilities
    names = [n for n in NAMES if n in look.probabilities and not (single and n == "fused")]
    return {name: look.probabilities[name] for name in names}


def as_json(look: Look, classes: Sequence[str], topk: int) -> dict[str, list[dict]]:
    """Return for each classifier [{"class", "index", "probability"}, …], the likeliest first."""
    return {
        who: [
            {"class": classes[i], "index": i, "probability": float(row[i])}
            for i in order_of(row, topk)
        ]
        for who, row in look.probabilities.items()
    }


def bars(model: Model, look: Look, topk: int) -> Element:
    """Return the likeliest classes of every classifier, each with a bar as long as it is likely."""
    single = "dist" not in look.probabilities
    groups = []
    for who, row in told(look).items():
        name = "answer" if single and who == "cls" else NAMES[who]
        items = [_bar(model.opened.classes[i], float(row[i])) for i in order_of(row, topk)]
        title = element("h3", element("span", class_="dot"), name)
        groups.append(element("div", title, element("ol", items), class_=f"answer {who}"))
    return element("div", groups, class_="answers")


def _bar(name: str, probability: float) -> Element:
    return element(
        "li",
        element("span", name, class_="class", title=name),
        element("span", percent(probability), class_="number"),
        element("span", element("i", style=f"width:{100 * probability:.2f}%"), class_="bar"),
    )


def percent(share: float) -> str:
    """Return a share for people: few digits where it is near neither end."""
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 or share == 0 else "< 0.1 %"


def verdict(model: Model, look: Look, truth: str = "") -> Element:
    """Return in words whether heads and teacher agree, and whether with the `truth` if known."""
    probabilities = look.probabilities
    said = {who: said_by(model, row) for who, row in told(look).items()}
    words: list = []
    if "dist" in said:
        if said["cls"] == said["dist"]:
            words += ["Both heads say ", element("b", said["cls"]), "."]
        else:
            words += ["The heads differ: the class head says ", *_sure(model, said, probabilities)]
            words += [", together they say ", element("b", said["fused"]), "."]
    else:
        words += ["It says ", element("b", said["cls"]), "."]
    whole = said.get("fused", said["cls"])
    if "teacher" in said:
        agrees = said["teacher"] == whole
        words += [" The teacher agrees." if agrees else " The teacher says "]
        words += [] if agrees else [element("b", said["teacher"]), "."]
    if truth:
        words += [" In the data it is ", element("b", truth)]
        words += [", so that is right." if truth == whole else ", so that is wrong."]
    differ = len({*said.values()}) > 1
    return element("p", words, class_=f"verdict{' differ' if differ else ''}")


def _sure(model: Model, said: Mapping[str, str], probabilities) -> list:
    first, second = (float(probabilities[who].max()) for who in ("cls", "dist"))
    sure = ("", "") if model.several else (f" ({percent(first)})", f" ({percent(second)})")
    return [
        *(element("b", said["cls"]), f"{sure[0]}, the distillation head "),
        *(element("b", said["dist"]), sure[1]),
    ]


def said_by(model: Model, row: np.ndarray) -> str:
    """Return the answer in words: the likeliest class, or all that are found of several."""
    classes = model.opened.classes
    if not model.several:
        return classes[order_of(row, 1)[0]]
    found = [classes[i] for i in order_of(row, len(row)) if row[i] >= HALF]
    return ", ".join(found) or "no class"
