"""Line charts as inline SVG: they scale with the window and take the page's colours."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from deit_jax.analysis.report.html import Element, element

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 40, 46  # TOP has room for the axis of epochs
MOST = 2000  # points that are drawn of a curve; of a longer one, the extremes of each short stretch
MARKED = 30  # points at most that are marked one by one
Number = int | float


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve; `colour` 0 … 7 and `dash` 0 … 3 are the page's. A value of None is a gap."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number | None]
    colour: int = 0
    dash: int = 0


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range of values, on a length of the drawing."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def place(self, value: Number) -> float:
        """Return where a value stands."""
        low, high = (math.log10(v) if self.log else v for v in (self.low, self.high))
        value = math.log10(value) if self.log else value
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[Number]:
        """Return some round values."""
        if not self.log:
            return ticks(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        digits = (1,) if last - first > 2 else (1, 2, 5)
        found = [d * 10.0**e for e in range(first, last + 1) for d in digits]
        return [v for v in found if self.low <= v <= self.high]


def ticks(low: Number, high: Number, most: int = 5) -> list[Number]:
    """Return at most about `most` + 1 round values between two others, both included."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(d * power for d in (1, 2, 5, 10) if d * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    log: bool = False,
    per_epoch: int | None = None,
    note: str | None = None,
) -> Element | None:
    """Return a figure of curves over steps or layers with their legend; None without any point.

    `per_epoch` steps give a second axis, in epochs.
    """
    lines = [dataclasses.replace(line, y=_drawable(line.y, log)) for line in lines]
    lines = [line for line in lines if any(v is not None for v in line.y)]
    if not lines:
        return None
    x_axis = _axis([0, *(x for line in lines for x in line.x)], LEFT, WIDTH - RIGHT, pad=0)
    values = [y for line in lines for y in line.y if y is not None]
    y_axis = _axis(values, HEIGHT - BOTTOM, TOP, pad=0.05, log=log)
    y_label += ", logarithmic" if log else ""
    top = 0 if per_epoch else TOP - 12
    drawing = element(
        "svg",
        _frame(x_axis, y_axis, x_label, y_label),
        _epochs(x_axis, per_epoch) if per_epoch else None,
        [_curve(line, x_axis, y_axis) for line in lines],
        viewBox=f"0 {top} {WIDTH} {HEIGHT - top}",
        role="img",
        aria_label=f"{title}: {y_label} over {x_label}",
    )
    caption = element("figcaption", element("strong", title), f" {note}" if note else None)
    return element("figure", caption, drawing, legend(lines), class_="chart")


def _drawable(values: Sequence[Number | None], log: bool) -> list[Number | None]:
    return [None if v is None or (log and v <= 0) else v for v in values]


def _axis(values: Sequence[Number], start, end, pad: Number, log: bool = False) -> Axis:
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.2, high * 1.2, start, end, log)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    if high == low:
        return Axis(low - spread / 2, high + spread / 2, start, end)
    return Axis(low - pad * spread, high + pad * spread, start, end)


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[Element]:
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    found = []
    for value in y_axis.ticks():
        y = f"{y_axis.place(value):.1f}"
        found.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        text = element("text", number(value), x=LEFT - 6, y=y, dy="0.35em", text_anchor="end")
        found.append(text)
    for value in x_axis.ticks():
        x = f"{x_axis.place(value):.1f}"
        found.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="tick"))
        found.append(element("text", number(value), x=x, y=bottom + 17, text_anchor="middle"))
    path = f"M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"
    centre = (LEFT + WIDTH - RIGHT) / 2
    turned = f"translate(13 {middle:.0f}) rotate(-90)"
    return [
        *found,
        element("path", d=path, class_="axis"),
        element("text", x_label, x=centre, y=HEIGHT - 8, text_anchor="middle"),
        element("text", y_label, transform=turned, text_anchor="middle"),
    ]


def _epochs(x_axis: Axis, per_epoch: int) -> list[Element]:
    scale = Axis(x_axis.low / per_epoch, x_axis.high / per_epoch, x_axis.start, x_axis.end)
    found = [element("text", "epoch", x=LEFT - 10, y=TOP - 10, text_anchor="end")]
    for value in ticks(scale.low, scale.high):
        x = f"{scale.place(value):.1f}"
        found.append(element("line", x1=x, x2=x, y1=TOP - 4, y2=TOP, class_="tick"))
        found.append(element("text", number(value), x=x, y=TOP - 10, text_anchor="middle"))
    return found


def _curve(line: Line, x_axis: Axis, y_axis: Axis) -> Element:
    points = thinned([*zip(line.x, line.y, strict=True)])
    places = [
        None if y is None else (f"{x_axis.place(x):.1f}", f"{y_axis.place(y):.1f}")
        for x, y in points
    ]
    path = ""
    for before, place in pairwise([None, *places]):
        if place:  # a gap before it begins anew
            path += f"{'L' if before else 'M'}{place[0]} {place[1]}"
    marks = [p for p in places if p] if len(places) <= MARKED else []
    return element(
        "g",
        element("title", line.name),
        element("path", d=path, class_=f"curve d{line.dash}"),
        [element("circle", cx=x, cy=y, r=2.5) for x, y in marks],
        class_=f"c{line.colour}",
    )


def thinned(points: list[tuple[Number, Number | None]]) -> list[tuple[Number, Number | None]]:
    """Return the points of a curve, of a long one the lowest and highest of each short stretch."""
    if len(points) <= MOST:
        return points
    kept = []
    for stretch in np.array_split(np.arange(len(points)), MOST // 2):
        known = [i for i in stretch if points[i][1] is not None] or [stretch[0]]
        ends = {min(known, key=lambda i: points[i][1]), max(known, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept


def legend(lines: Sequence[Line]) -> Element:
    """Return the names of curves, each with a piece of it and its last value."""
    items = []
    for line in lines:
        last = next(v for v in reversed(line.y) if v is not None)
        piece = element(
            "svg",
            element("path", d="M1 5H27", class_=f"curve d{line.dash}"),
            viewBox="0 0 28 10",
            class_=f"key c{line.colour}",
            aria_hidden="true",
        )
        items.append(element("li", piece, f" {line.name} ", element("b", f"{last:.4g}")))
    return element("ul", items, class_="legend")


def number(value: Number) -> str:
    """Return a value on an axis, in few letters: 1.5e-3, 200k."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    if size < 0.01:
        digits, exponent = f"{value:e}".split("e")
        text = f"{float(digits):g}e{int(exponent)}"
    else:
        text = f"{value / 1000:g}k" if size >= 1e5 else f"{value:g}"
    return text.replace("-", "\N{MINUS SIGN}")
