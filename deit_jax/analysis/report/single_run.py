"""The sections of a report on a single run: mistakes, tokens, what it looks at, its config."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from deit_jax.analysis.report import html
from deit_jax.analysis.report.comparison import HEADS, heat_table, table
from deit_jax.analysis.report.html import Element, element
from deit_jax.analysis.report.svg_charts import Line, line_chart
from deit_jax.config.serialize import flatten
from deit_jax.data.channels import as_colours

TOKENS = {"cls": "class token", "dist": "distillation token"}
Run = Mapping[str, Any]
Pictures = Mapping[int, np.ndarray]


def state(run: Run) -> str:
    """Return in one sentence how far a run is."""
    total, epoch = run["total_steps"], run["steps_per_epoch"]
    text = f"step {run['step']}" + (f" of {total}" if total else "")
    if epoch:
        text += f" (epoch {run['step'] / epoch:.3g}" + (
            f" of {total / epoch:.3g})" if total else ")"
        )
    if run["finished"]:
        return f"finished at {text}"
    return f"under way, at {text}" if run["under_way"] else f"not finished, at {text}"


def images_text(evaluation: Mapping[str, Any]) -> str:
    """Return on which images a run was evaluated."""
    used, there = evaluation["images"], evaluation["of"]
    if left_out := evaluation.get("unreadable", 0):
        return f"{used} of {there} images ({left_out} more cannot be read)"
    return f"all {there} images" if used == there else f"{used} of {there} images, evenly spaced"


def confusion(run: Run) -> list[Element]:
    """Return the confusion matrix, or of many classes the pairs that are confused most."""
    found = run["evaluation"]
    text = (
        f"Of the fused prediction, on {images_text(found)}: {found['top1']['fused']:.2f} % right."
    )
    if found["unanswered"]:
        text += f" {found['unanswered']} images got logits that are not finite, and no label."
    parts = [element("p", text)]
    if found["confusion"]:
        names, counts = [c["class"] for c in found["classes"]], np.array(found["confusion"])
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        texts = [[str(n) if n else "" for n in row] for row in counts]
        label = "confusion matrix: images of each class by predicted class"
        caption = "Rows: the true class; columns: the prediction; cells: images, coloured by their "
        caption += "share of the row."
        parts += [
            heat_table(names, names, share, texts, label),
            element("p", caption, class_="faint"),
        ]
        return parts
    rows = [
        _row(pair["class"], pair["predicted"], str(pair["examples"])) for pair in found["confused"]
    ]
    worst = sorted(
        (c for c in found["classes"] if c["examples"]), key=lambda c: c["right"] / c["examples"]
    )[:20]
    low = [_row(c["class"], f"{c['right']} of {c['examples']}") for c in worst]
    first = element("p", f"The most confused pairs of the {len(found['classes'])} classes:")
    second = element("p", "The classes with the lowest accuracy:")
    columns = [
        element("div", first, table(["class", "predicted", "images"], rows, "pairs")),
        element("div", second, table(["class", "right"], low, "pairs")),
    ]
    return [*parts, element("div", columns, class_="side-by-side")]


def precisions(run: Run) -> list[Element]:
    """Return the average precision of every class, for images with several labels."""
    evaluation = run["evaluation"]
    heads = [head for head in HEADS if head in evaluation["AP"]]
    text = (
        f"On {images_text(evaluation)}, in percent; the first row is the mean over the classes "
        "that are there. Classes that no image has are left empty."
    )
    rows = [_row("mean (mAP)", *(f"{evaluation['mAP'][head]:.2f}" for head in heads))]
    for name in evaluation["AP"][heads[0]]:
        values = [evaluation["AP"][head][name] for head in heads]
        rows.append(_row(name, *("" if v is None else f"{v:.2f}" for v in values)))
    return [element("p", text), table(["class", *(HEADS[h] for h in heads)], rows, "list")]


def _row(*cells: str) -> Element:
    return element("tr", [element("td", text) for text in cells])


def mistakes(run: Run, pictures: Pictures) -> list[Element]:
    """Return the images that the model is most sure of in vain, with what the teacher says."""
    cards = []
    for found in run["evaluation"]["mistakes"]:
        teacher = found["teacher"]
        opinion = None
        if teacher:
            sure = "" if teacher["class"] is None else f" ({teacher['probability']:.0%})"
            opinion = [element("br"), f"teacher: {teacher['class'] or 'no answer'}{sure}"]
            opinion += [" ✓"] if teacher["right"] else []
        said = f"{found['predicted']} ({found['probability']:.0%})"
        image = _photograph(pictures[found["example"]], f"a {found['class']}, taken for {said}")
        words = element(
            "span", element("b", found["class"]), element("br"), "model: ", said, opinion
        )
        cards.append(element("li", image, words, title=found["name"]))
    return [
        element(
            "p",
            "Under each image: its class, the fused prediction with its probability"
            + (", and the teacher's; ✓: the teacher is right." if _has_teacher(run) else "."),
        ),
        element("ul", cards, class_="cards") if cards else element("p", "None is wrong."),
    ]


def _has_teacher(run: Run) -> bool:
    return "teacher" in run["evaluation"]["top1"]


def _photograph(pixels: np.ndarray, text: str) -> Element:
    small = "pixels" if max(pixels.shape) <= html.LARGE else None
    return element("img", src=html.photograph(pixels), alt=text, class_=small)


def tokens(run: Run) -> list[Element | None]:
    """Return the cosine of the two tokens, layer by layer."""
    found = run["tokens"]
    cosines = found["cosines"]
    line = Line("cosine", range(len(cosines)), cosines)
    text = (
        f"Class and distillation token, averaged over {found['images']} images; 0 is what enters "
        "the first block. The learned tokens alone, without position embedding: "
        f"{found['learned_cosine']:.3f}. DeiT-B in the paper (section 5.2): 0.06, and 0.93 after "
        "the last block."
    )
    chart = line_chart("Cosine of the two tokens", [line], "after block", "cosine")
    return [element("p", text), chart]


def attention(run: Run, pictures: Pictures) -> list[Element]:
    """Return what each token reads: the last layer's heads, and attention rollout."""
    found = run["attention"]
    text = (
        "For each held-out image and token: rollout through all layers, then each head of the last "
        f"one (block {found['layer']}). Violet: 0; yellow: the largest weight of that map. The "
        "share of the learned tokens themselves is left out."
    )
    looks = [_looks(i, found["tokens"], pictures[i["example"]]) for i in found["images"]]
    return [element("p", text), element("div", looks, class_="side-by-side")]


def _looks(found: Mapping[str, Any], names: Sequence[str], pixels: np.ndarray) -> Element:
    heads = len(found["last_layer"][0])
    columns = ["image", "", "rollout", *(f"head {i + 1}" for i in range(heads))]
    rows = []
    for i, token in enumerate(names):
        maps = [found["rollout"][i], *found["last_layer"][i]]
        picture = element("td", _photograph(pixels, f"a {found['class']}"), rowspan=len(names))
        cells = [
            element("td", _map(np.array(grid), f"{TOKENS[token]}, {name}"))
            for grid, name in zip(maps, columns[2:], strict=True)
        ]
        rows.append(element("tr", None if i else picture, element("th", TOKENS[token]), cells))
    head = element("thead", element("tr", [element("th", c, scope="col") for c in columns]))
    photo = f"--photo: url({html.photograph(pixels)})"
    whole = element("table", head, element("tbody", rows), style=photo)
    caption = element("figcaption", element("strong", found["class"]), f" {found['name']}")
    box = element("div", whole, class_="scroll", tabindex=0)
    return element("figure", caption, box, class_="looks")


def _map(grid: Float[np.ndarray, "g h"], text: str) -> Element:
    coloured = html.heat(grid, 0.0, float(grid.max()))
    image = html.data_uri(coloured)
    picture = element("img", src=image, alt=f"attention of {text}", class_="pixels")
    return element("div", picture, class_="over")


def positions(run: Run) -> list[Element]:
    """Return how alike the position embeddings of patches are."""
    found = np.array(run["position_similarity"])
    rows, columns = run["patch_grid"]
    off = found[~np.eye(len(found), dtype=bool)] if len(found) > 1 else found
    low, high = float(off.min()), float(off.max())
    tiles = np.stack([html.heat(row.reshape(rows, columns), low, high) for row in found])
    text = (
        f"Tile (i, j) of {rows} x {columns}: the cosine of the embedding of the patch in row i, "
        "column j with that of every patch, as in figure 7 of the ViT paper. A neighbourhood that "
        "stands out means that the model learned where patches are."
    )
    image = _sheet(tiles, columns, "cosine similarity of position embeddings")
    return [element("p", text), image, _scale(low, high, "cosine")]


def _sheet(tiles: np.ndarray, columns: int, text: str) -> Element:
    page = html.sheet(tiles, columns)
    # Enlarged by whole numbers, the pixels of a small sheet stay square.
    times = max(1, 520 // page.shape[1])
    page = page.repeat(times, axis=0).repeat(times, axis=1)
    return element("img", src=html.data_uri(page), alt=text, class_="map pixels")


def _scale(low: float, high: float, unit: str) -> Element:
    ramp = html.heat(np.linspace(0, 1, 64)[None], 0.0, 1.0)
    bar = element("img", src=html.data_uri(ramp), alt="colour scale")
    return element("div", f"{low:.2f}", bar, f"{high:.2f} {unit}", class_="scale")


def filters(run: Run) -> list[Element]:
    """Return the principal components of the patch embedding."""
    found = np.array(run["patch_filters"])
    colours = "red, green and blue" if found.shape[-1] == 3 else "values, as its first channels"
    text = (
        f"The first {len(found)} principal components of the filters that turn a patch of "
        f"{found.shape[1]} x {found.shape[2]} pixels into a token, row by row, each scaled to its "
        f"own range of {colours}."
    )
    tiles = as_colours(np.rint(255 * found).astype(np.uint8))
    return [element("p", text), _sheet(tiles, 7, "filters of the patch embedding")]


def config(run: Run) -> list[Element]:
    """Return every field of the resolved config, folded away."""
    rows = [
        element("tr", element("th", key), element("td", str(value)))
        for key, value in flatten(run["config"]).items()
    ]
    summary = element("summary", f"{len(rows)} fields of the resolved config")
    return [element("details", summary, table(["field", "value"], rows, "fields"))]


def versions(run: Run) -> list[Element]:
    """Return what the run was started with, and what befell it."""
    starts = [e for e in run["history"] if e.get("event") == "start"]
    if not starts:
        return [element("p", "Nothing is recorded of its start.")]
    last = flatten(starts[-1])
    last["command"] = " ".join(map(str, last.get("command", [])))
    rows = [
        element("tr", element("th", key.removeprefix("packages.")), element("td", str(value)))
        for key, value in last.items()
        if value is not None and key not in ("event", "pid")
    ]
    events = [_event(e) for e in run["history"] if "event" in e]
    return [
        element(
            "details",
            element(
                "summary", f"Versions, command and machine of its last start ({len(starts)} in all)"
            ),
            table(["", ""], rows, "fields"),
        ),
        element(
            "details",
            element("summary", f"History ({len(events)})"),
            table(["time", "event", ""], events, "fields"),
        ),
    ]


def _event(event: Mapping[str, Any]) -> Element:
    left_out = ("time", "event", "command", "git", "python", "packages", "host", "pid")
    rest = ", ".join(f"{k}: {v}" for k, v in event.items() if k not in left_out)
    return _row(str(event.get("time", "")), event["event"], rest)
