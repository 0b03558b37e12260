"""The study's pictures: distillation, cosines of the tokens, longer training."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt

NAMES = {
    "table3": "distillation.svg",
    "tokens": "tokens.svg",
    "table8": "recipe.svg",
    "figure3": "epochs.svg",
}
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"  # of Okabe and Ito's palette


def draw(found: dict, folder: Path) -> None:
    """Draw what has been measured into a folder, the same bytes from the same figures."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.hashsalt": "deit_jax", "font.size": 9, "svg.fonttype": "none"})
    drawn = {"table3": distillation, "tokens": cosines, "table8": recipe, "figure3": epochs}
    for table, draw_one in drawn.items():
        if found[table].all:
            figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
            draw_one(axis, found[table])
            axis.spines[["top", "right"]].set_visible(False)
            # Without a date, and white: a page may be dark.
            figure.savefig(folder / NAMES[table], metadata={"Date": None}, facecolor="white")
            plt.close(figure)


def _mean_and_error(values) -> tuple[float, float]:
    values = np.array(values, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return values.mean().item(), float(error)


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
    for place, (_, arm, head, colour) in enumerate(reversed(rows)):
        values = list(found.seeds(arm, head).values())
        if values:
            mean, error = _mean_and_error(values)
            axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=4)
            axis.errorbar(mean, place, xerr=error, fmt="|", color=colour, markersize=14, capsize=3)
    axis.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    axis.set_xlabel("top-1 on 10 000 test images, % (dots: seeds; bars: mean ± standard error)")
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
                label=f"{name}, same target" if arm != "token" else name,
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
            means, errors = zip(*map(_mean_and_error, points), strict=True)
            places = (length, 3 * length)
            axis.errorbar(places, means, yerr=errors, fmt="o-", color=colour, label=name, capsize=3)
            axis.set_xticks(places)
    axis.set(xlabel="epochs", ylabel="top-1 on 10 000 test images, %")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
