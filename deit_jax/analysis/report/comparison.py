"""The sections of a report that hold several runs side by side: curves, accuracies, configs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deit_jax.analysis.report.html import Element, element
from deit_jax.analysis.report.svg_charts import Line, line_chart
from deit_jax.config.serialize import flatten
from deit_jax.step import schedules

HEADS = {
    "teacher": "teacher",
    "cls": "class head",
    "dist": "distillation head",
    "fused": "fused",
    "ema.cls": "class head, EMA",
    "ema.dist": "distillation head, EMA",
    "ema.fused": "fused, EMA",
}
FIGURES = {"top1": "top-1, %", "top5": "top-5, %", "mAP": "mAP, %"}
LOSSES = {
    "loss": "loss",
    "loss_label": "of the labels",
    "loss_teacher": "of the teacher",
    "loss_feature": "of its features",
}
SCHEDULED = {name: f"distill.{name}" for name in schedules.SCHEDULED}
ENTROPY = {
    "attention_entropy/mean": "mean of all heads",
    "attention_entropy/lowest_head": "lowest head",
}
ACCURACY = {f"eval/{key}.top1": name for key, name in HEADS.items()}
PRECISION = {f"eval/{key}.mAP": name for key, name in HEADS.items()}
CHARTS = (
    # (title, {curve: name}, unit, factor, logarithmic if it spans decades)
    ("Training loss", LOSSES, "nats", 1, False),
    ("Accuracy on held-out images", ACCURACY, "top-1, %", 1, False),
    ("Average precision on held-out images", PRECISION, "mAP, %", 1, False),
    ("What changes in the distillation", SCHEDULED, "value", 1, False),
    ("Learning rate", {"lr": "learning rate"}, "learning rate", 1, False),
    ("Gradient norm", {"grad_norm": "gradient norm"}, "norm of the gradient", 1, True),
    ("Throughput", {"images_per_second": "throughput"}, "images/s", 1, False),
    ("Waiting for input", {"input_wait": "waiting for input"}, "% of the time", 100, False),
    ("Entropy of attention", ENTROPY, "nats", 1, False),
)
DASHES = {  # of several runs' curves; 0, a whole line, for the rest
    **{"eval/cls.mAP": 1, "eval/dist.mAP": 2},
    **{"eval/cls.top1": 1, "eval/dist.top1": 2, "loss_label": 1, "loss_teacher": 2},
    "loss_feature": 3,
    "attention_entropy/lowest_head": 1,
}
FEW = 3  # runs of which a chart shows every curve; of more, only the one that matters most
MAIN = ("loss", "eval/fused.top1", "eval/fused.mAP", "attention_entropy/mean")
DECADES = 30  # times that a curve's largest value is its smallest, for a logarithmic axis


def curves(runs: Sequence[Mapping[str, Any]]) -> Element | None:
    """Return the charts of what runs wrote while they trained; None if there is nothing yet."""
    lengths = {run["steps_per_epoch"] for run in runs}
    per_epoch = lengths.pop() if len(lengths) == 1 else None
    charts = []
    for title, keys, unit, factor, log in CHARTS:
        lines = _lines(runs, keys, factor)
        values = [y for line in lines for y in line.y if y]
        log = log and bool(values) and min(values) > 0 and max(values) > DECADES * min(values)
        charts.append(line_chart(title, lines, "step", unit, log, per_epoch))
    charts = [chart for chart in charts if chart is not None]
    return element("div", charts, class_="grid-of-charts") if charts else None


def _lines(runs: Sequence[Mapping[str, Any]], keys: Mapping[str, str], factor: int):
    """Return one line a run and curve: colours tell the runs apart, or a single run's curves."""
    several, lines = len(runs) > 1, []
    for number, run in enumerate(runs):
        shown = _shown(run["curves"], keys, len(runs))
        for key in shown:
            curve = run["curves"][key]
            values = [None if v is None else factor * v for v in curve["value"]]
            place = list(keys).index(key.replace("/ema.", "/"))  # an average has its head's colour
            name, colour, dash = keys[key], place % 8, int("/ema." in key)
            if several:
                name = run["name"] if len(keys) == 1 else f"{run['name']}: {keys[key]}"
                colour, dash = number % 8, DASHES.get(key, 0) if len(shown) > 1 else 0
            lines.append(Line(name, curve["step"], values, colour, dash))
    return lines


def _shown(curves: Mapping[str, Any], keys: Mapping[str, str], runs: int) -> list[str]:
    """Return the curves of a chart, of so many runs, that a run has and that say something."""
    same = [] if "loss_teacher" in curves else ["loss_label"]
    if "eval/dist.top1" not in curves:  # the fused prediction is that of the only head
        same += ["eval/fused.top1", "eval/ema.fused.top1"]
    if "eval/dist.mAP" not in curves:
        same += ["eval/fused.mAP", "eval/ema.fused.mAP"]
    shown = [key for key in keys if key in curves and key not in same]
    if runs > 1:
        shown = [key for key in shown if "/ema." not in key]
    if runs > FEW:
        shown = [key for key in shown if key in MAIN] or shown[-1:]
    return shown


def accuracies(runs: Sequence[Mapping[str, Any]]) -> Element | None:
    """Return the table of every run's last accuracies, None before the first evaluation."""
    told = [run["accuracy"]["heads"] for run in runs if run["accuracy"]]
    known = [
        k for k in FIGURES if any(k in figures for heads in told for figures in heads.values())
    ]
    rows = []
    for run in runs:
        if not run["accuracy"]:
            continue
        heads = run["accuracy"]["heads"]
        for key in (k for k in HEADS if k in heads):
            cells = [element("td", run["name"])] if len(runs) > 1 else []
            figures = [heads[key].get(k) for k in known]
            texts = ["" if v is None else f"{v:.2f}" for v in figures]
            rows.append(
                element(
                    "tr",
                    cells,
                    element("td", HEADS[key]),
                    [element("td", text, class_="number") for text in texts],
                    element("td", str(run["accuracy"]["step"]), class_="number"),
                )
            )
    if not rows:
        return None
    first = ["run"] if len(runs) > 1 else []
    return table([*first, "", *(FIGURES[k] for k in known), "after step"], rows, "accuracies")


def table(headings: Sequence[str], rows: Sequence[Element], class_: str) -> Element:
    """Return rows under headings, in a box that scrolls where the window is too narrow."""
    numbers = [h.endswith("%") or h == "after step" for h in headings]
    cells = [
        element("th", text, class_="number" if right else None)
        for text, right in zip(headings, numbers, strict=True)
    ]
    body = element("tbody", list(rows))
    whole = element("table", element("thead", element("tr", cells)), body, class_=class_)
    return element("div", whole, class_="scroll", tabindex=0)


def heat_table(
    rows: Sequence[str], columns: Sequence[str], values, texts: Sequence[Sequence[str]], label: str
) -> Element:
    """Return a matrix whose cells are the more coloured the larger their values are."""
    values = np.asarray(values, np.float64)
    largest = max(float(values.max()), 1e-12)
    upright = "upright" if max(len(c) for c in columns) > 4 else None
    heads = [
        element("th", element("span", shortened(c), class_=upright), title=c, scope="col")
        for c in columns
    ]
    body = []
    for name, row, said in zip(rows, values, texts, strict=True):
        cells = [
            element("td", text, style=f"--a:{value / largest:.3f}")
            for value, text in zip(row, said, strict=True)
        ]
        body.append(element("tr", element("th", shortened(name), title=name, scope="row"), cells))
    head = element("thead", element("tr", element("th"), heads))
    whole = element("table", head, element("tbody", body), class_="heat", aria_label=label)
    return element("div", whole, class_="scroll", tabindex=0)


def shortened(text: str, most: int = 32) -> str:
    """Return a name that fits into a table."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def disagreement(found: Mapping[str, Any], several: bool) -> Element:
    """Return the matrix of how often each two classifiers differ."""
    names = [
        f"{c['run']}: {HEADS[c['head']]}" if several else HEADS[c["head"]]
        for c in found["classifiers"]
    ]
    texts = [[f"{v:.1f}" for v in row] for row in found["percent"]]
    return heat_table(names, names, found["percent"], texts, "disagreement, % of the images")


def config_differences(runs: Sequence[Mapping[str, Any]]) -> Element | None:
    """Return the table of fields whose values differ between runs, None if none do."""
    flat = [flatten(run["config"]) for run in runs]
    keys = list(dict.fromkeys(key for fields in flat for key in fields))
    rows = []
    for key in keys:
        texts = ["(no such field)" if key not in f else str(f[key]) for f in flat]
        if len(set(texts)) > 1:
            rows.append(element("tr", element("th", key), [element("td", t) for t in texts]))
    return table(["field", *(run["name"] for run in runs)], rows, "fields") if rows else None
