"""The study's pictures: accuracies and differences with their seeds, cosines, longer training."""

from pathlib import Path

import matplotlib
import numpy as np
from found import bounds

matplotlib.use("svg")
import matplotlib.pyplot as plt

NAMES = {
    "claim": "claim.svg",
    "frameworks": "frameworks.svg",
    "lengths": "lengths.svg",
    "table3": "distillation.svg",
    "tokens": "tokens.svg",
    "table8": "recipe.svg",
    "figure3": "epochs.svg",
}
# Between runs of the same seed: name, (arm, head), (arm it is compared with, head), the paper's.
_HARD, _TOKEN = ("hard-3x", "fused"), "token-3x"
COMPARISONS = (
    ("both heads against hard, class token", (_TOKEN, "fused"), _HARD, 0.4),
    ("distillation head against hard, class token", (_TOKEN, "dist"), _HARD, 0.1),
    ("class head against hard, class token", (_TOKEN, "cls"), _HARD, 0.0),
    ("distillation head against class head", (_TOKEN, "dist"), (_TOKEN, "cls"), 0.1),
    ("both heads against distillation head", (_TOKEN, "fused"), (_TOKEN, "dist"), 0.3),
)
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"  # of Okabe and Ito's palette


def draw(found: dict, folder: Path) -> None:
    """Draw what has been measured into a folder, the same bytes from the same figures."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.hashsalt": "deit_jax", "font.size": 9, "svg.fonttype": "none"})
    drawn = {
        "claim": claim,
        "frameworks": frameworks,
        "lengths": lengths,
        "table3": distillation,
        "tokens": cosines,
        "table8": recipe,
        "figure3": epochs,
    }
    for table, draw_one in drawn.items():
        if found[table].all:
            figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
            draw_one(axis, found[table])
            axis.spines[["top", "right"]].set_visible(False)
            # Without a date, and white: a page may be dark.
            figure.savefig(folder / NAMES[table], metadata={"Date": None}, facecolor="white")
            plt.close(figure)


def claim(axis, found) -> None:
    """Draw the differences between runs of the same seed, and the paper's."""
    values = [found.pairs(*own, *base) for _, own, base, _ in COMPARISONS]
    names = [name.replace(" against ", "\nagainst ") for name, *_ in COMPARISONS]
    _dots(axis, names, values, [ORANGE] * len(values))
    for place, (*_, paper) in enumerate(reversed(COMPARISONS)):
        label = "" if place else "paper: DeiT-B, ImageNet"
        axis.plot(paper, place, "x", color="black", label=label)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set_xlabel("points of top-1 (a dot a seed; bars: mean, 95 % interval)")
    axis.legend(frameon=False)


def frameworks(axis, found) -> None:
    """Draw every run of both frameworks."""
    heads = (("class head", "cls"), ("distillation head", "dist"), ("both", "fused"))
    arms = (("ours", "recipe-ours", ORANGE), ("timm", "recipe-timm-our-order", BLUE))
    rows = [(f"{say}: {name}", arm, head, c) for say, head in heads for name, arm, c in arms]
    _accuracies(axis, found, rows)


def lengths_of(found) -> list[float]:
    """Return the lengths of the token's runs, in the scale's epochs."""
    names = (name.partition("token-")[2] for name in found.all["arms"])
    return sorted(float(name.removesuffix("x")) for name in names if name.endswith("x"))


def lengths(axis, found) -> None:
    """Draw what the token gains by the length of the training."""
    lines = (
        ("both heads against hard, class token", "fused", ("hard", "fused"), ORANGE),
        ("distillation head against class head", "dist", ("token", "cls"), BLUE),
    )
    for name, head, (base, base_head), colour in lines:
        points = {}
        for times in lengths_of(found):
            pairs = found.pairs(f"token-{times:g}x", head, f"{base}-{times:g}x", base_head)
            if len(pairs) > 1:
                points[times * found.all["scale"]["epochs"]] = pairs
        if not points:
            continue
        means, lows, highs = np.transpose([bounds(pairs) for pairs in points.values()])
        said = f"{name} (n={', '.join(str(len(pairs)) for pairs in points.values())})"
        ends = (means - lows, highs - means)
        axis.errorbar(list(points), means, yerr=ends, fmt="o-", color=colour, label=said, capsize=3)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set(xlabel="epochs", ylabel="points of top-1 (95 % interval)", xscale="log")
    places = [times * found.all["scale"]["epochs"] for times in lengths_of(found)]
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    axis.grid(alpha=0.3)


def distillation(axis, found) -> None:
    """Draw every seed and the mean of every row of table 3."""
    rows = [
        ("no teacher", "none", "fused", GREY),
        ("soft, class token", "soft", "fused", GREY),
        ("hard, class token", "hard", "fused", BLUE),
        ("distillation token:\nclass head", "token", "cls", ORANGE),
        ("distillation head", "token", "dist", ORANGE),
        ("both", "token", "fused", ORANGE),
    ]
    _accuracies(axis, found, rows)


def recipe(axis, found) -> None:
    """Draw every seed and the mean of the rows of table 8 that learned."""
    rows = [
        ("DeiT's recipe", "none", "fused", BLUE),
        ("moving average", "none", "ema.fused", GREY),
        ("no RandAugment", "no-randaugment", "fused", ORANGE),
        ("no mixup", "no-mixup", "fused", ORANGE),
        ("no cutmix", "no-cutmix", "fused", ORANGE),
        ("neither", "no-mixup-no-cutmix", "fused", ORANGE),
        ("no erasing", "no-erasing", "fused", ORANGE),
        ("no stochastic depth", "no-stochastic-depth", "fused", ORANGE),
        ("no repeated augmentation", "no-repeated-augmentation", "fused", ORANGE),
        ("dropout", "dropout", "fused", GREY),
    ]
    _accuracies(axis, found, rows)


def _accuracies(axis, found, rows) -> None:
    values = [list(found.seeds(arm, head).values()) for _, arm, head, _ in rows]
    _dots(axis, [name for name, *_ in rows], values, [colour for *_, colour in rows])
    axis.set_xlabel("top-1, % (a dot a seed; bars: mean, 95 % interval)")


def _dots(axis, names, values, colours) -> None:
    """Draw the seeds, the mean and its interval of every row, and say their number."""
    for place, (of_row, colour) in enumerate(zip(values[::-1], colours[::-1], strict=True)):
        axis.plot(of_row, [place] * len(of_row), "o", color=colour, alpha=0.35, markersize=4)
        if len(of_row) > 1:
            mean, low, high = bounds(of_row)
            ends = [[mean - low], [high - mean]]
            axis.errorbar(mean, place, xerr=ends, fmt="|", color=colour, markersize=14, capsize=3)
    said = [f"{name} (n={len(v)})" for name, v in zip(names, values, strict=True)]
    axis.set_yticks(range(len(said)), said[::-1])
    axis.grid(axis="x", alpha=0.3)


def cosines(axis, found) -> None:
    """Draw the cosine of the two tokens after every layer."""
    arms = (("distillation token", "token", ORANGE), ("two class tokens", "two-class-tokens", GREY))
    for name, arm, colour in arms:
        values = np.array(list(found.seeds(arm, "cosines").values()))
        if len(values):
            layers = np.arange(values.shape[1])
            axis.plot(layers, values.T, color=colour, alpha=0.3, linewidth=0.8)
            axis.plot(
                layers,
                values.mean(0),
                "o-",
                color=colour,
                label=f"{name}{'' if arm == 'token' else ', same target'} (n={len(values)})",
            )
            axis.set_xticks(layers, ["input", *map(str, layers[1:])])
    axis.axhline(0.93, color=ORANGE, linestyle=":", label="paper: DeiT-B, last layer")
    axis.set(xlabel="after block", ylabel="cosine of the two tokens", ylim=(None, 1.03))
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)


def epochs(axis, found) -> None:
    """Draw accuracy against the length of the training."""
    length = found.all["scale"]["epochs"]
    for name, arm, colour in (
        ("no teacher", "none", GREY),
        ("distillation token", "token", ORANGE),
    ):
        points = [list(found.seeds(which, "fused").values()) for which in (arm, f"{arm}-3x")]
        if all(points):
            means, lows, highs = np.transpose([bounds(values) for values in points])
            places, ends = (length, 3 * length), (means - lows, highs - means)
            said = f"{name} (n={' and '.join(str(len(values)) for values in points)})"
            axis.errorbar(places, means, yerr=ends, fmt="o-", color=colour, label=said, capsize=3)
            axis.set_xticks(places)
    axis.set(xlabel="epochs", ylabel="top-1, % (mean, 95 % interval)")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
