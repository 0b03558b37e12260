"""One page on one or several runs, for a browser."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from deit_jax.analysis.figures import Analysis
from deit_jax.analysis.report import comparison, data_section, single_run
from deit_jax.analysis.report.html import Element, document, element

STYLE = resources.files("deit_jax.analysis.report").joinpath("style.css").read_text()
# The page may load nothing, whatever is in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
NO_TRANSFORMER = "A convolutional network: no tokens, attention or positions to show."


def page(found: Analysis) -> str:
    """Return the report on an analysis as HTML."""
    runs = found.figures["runs"]
    title = ", ".join(run["name"] for run in runs)
    sections = _shared(found.figures)
    sections += [
        section
        for i, (run, pictures) in enumerate(zip(runs, found.pictures, strict=True), 1)
        for section in _of_run(run, pictures, f"run-{i}")
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", f"{title}: deit report"),
        element("style", STYLE),
    )
    made = "Made by deit_jax {deit_jax} on {generated}, computed on: {device}."
    made = made.format(**found.figures)
    header = element("header", element("h1", title), _overview(runs), element("p", made))
    body = element("body", header, _contents(sections), element("main", sections))
    return document(element("html", head, body, lang="en"))


def _overview(runs: Sequence[Mapping[str, Any]]) -> Element:
    items = [
        element(
            "li",
            element("a", run["name"], href=f"#run-{i}"),
            f": {run['model']} on {run['source']}, {single_run.state(run)}",
        )
        for i, run in enumerate(runs, 1)
    ]
    return element("ul", items)


def _section(level: int, name: str, heading: str, *content) -> Element:
    return element("section", element(f"h{level}", heading), content, id=name)


def _contents(sections: Sequence[Element]) -> Element:
    """Return the table of contents, a run's sections below the run."""
    items: list[Element] = []
    for section in sections:
        heading = section[0]
        link = element("a", heading.text, href=f"#{section.get('id')}")
        if heading.tag == "h3":
            below = items[-1].find("ul")
            if below is None:
                below = element("ul")
                items[-1].append(below)
            below.append(element("li", link))
        else:
            items.append(element("li", link))
    return element("nav", element("ul", items), aria_label="contents")


def _shared(figures: Mapping[str, Any]) -> list[Element]:
    runs, several = figures["runs"], len(figures["runs"]) > 1
    nothing = element("p", "Nothing is written yet.")
    drawn, table = comparison.curves(runs), comparison.accuracies(runs)
    sources = {run["accuracy"]["from"] for run in runs if run["accuracy"]}
    newest = "of the newest evaluation; the run has not written its results yet."
    text = f"From {' and '.join(sorted(sources))}" if sources else ""
    text += f": {newest}" if sources == {"metrics.jsonl"} else "."
    legends = element("p", "Beside the names: the last value.", class_="faint")
    found = [
        _section(2, "curves", "Curves", nothing if drawn is None else [legends, drawn]),
        _section(
            2,
            "accuracy",
            "Accuracy on held-out images",
            element("p", "There was no evaluation yet." if table is None else text),
            table,
        ),
        _disagreement(figures, several),
    ]
    if several:
        table = comparison.config_differences(runs)
        same = element("p", "None: the configs are the same.")
        found.append(
            _section(2, "differences", "Fields that differ", same if table is None else table)
        )
    return [section for section in found if section is not None]


def _disagreement(figures: Mapping[str, Any], several: bool) -> Element | None:
    differing = figures["disagreement"]
    evaluated = [r for r in figures["runs"] if "top1" in (r["evaluation"] or {})]
    if differing is None and not (several and evaluated):
        return None
    if differing is None:
        why = "The runs were not evaluated on the same images of the same classes."
        return _section(2, "disagreement", "Disagreement", element("p", why))
    text = f"The share of {differing['images']} held-out images, in percent, that each two "
    text += "classifiers give different labels (DeiT, table 4)."
    matrix = comparison.disagreement(differing, several)
    return _section(2, "disagreement", "Disagreement", element("p", text), matrix)


def _of_run(run: Mapping[str, Any], pictures, name: str) -> list[Element]:
    """Return a run's sections: what it is, then those that there are figures for."""
    found = [_introduction(run, name)]
    evaluation = run["evaluation"] and run["evaluation"]["images"]
    several = evaluation and "mAP" in run["evaluation"]  # labels an image: nothing to confuse
    single = evaluation and not several
    for key, heading, there, content in (
        ("precision", "Average precision", several, lambda: single_run.precisions(run)),
        ("confusion", "Confusion", single, lambda: single_run.confusion(run)),
        (
            "mistakes",
            "Most confident mistakes",
            single,
            lambda: single_run.mistakes(run, pictures),
        ),
        ("tokens", "The two tokens", run["tokens"], lambda: single_run.tokens(run)),
        (
            "attention",
            "Attention",
            run["attention"],
            lambda: single_run.attention(run, pictures),
        ),
        (
            "positions",
            "Position embeddings",
            run["position_similarity"],
            lambda: single_run.positions(run),
        ),
        ("filters", "Patch embedding", run["patch_filters"], lambda: single_run.filters(run)),
        ("data", "Data", run["data_card"], lambda: data_section.content(run["data_card"])),
        ("config", "Config", run["config"], lambda: single_run.config(run)),
        ("versions", "Versions", True, lambda: single_run.versions(run)),
    ):
        if there:
            found.append(_section(3, f"{name}-{key}", heading, content()))
    return found


def _introduction(run: Mapping[str, Any], name: str) -> Element:
    lines = [f"{run['model']} on {run['source']}, {single_run.state(run)}. {run['workdir']}"]
    if run["evaluation"]:
        images = single_run.images_text(run["evaluation"])
        average = " (the weights' moving average)" if run["checkpoint_ema"] else ""
        lines.append(
            f"What follows is of the checkpoint after step {run['checkpoint_step']}{average}, on "
            f"{images} of the evaluation data."
        )
        if not run["attention"]:
            lines.append(NO_TRANSFORMER)
        elif not run["tokens"]:
            lines.append("It has a class token alone: there is no second one to compare it with.")
    missing = {
        "checkpoint": "Nothing is saved yet to look at, or it cannot be read",
        "data": "No figures on images: the data cannot be opened",
        "classes": "The data has another order of classes than the run",
        "teacher": "The teacher's opinion is missing: its weights cannot be opened",
    }
    notes = [
        element("p", f"{missing[key]} ({text})", class_="note")
        for key, text in run["notes"].items()
    ]
    return _section(2, name, run["name"], [element("p", line) for line in lines], notes)
