"""Draw what both tokens of a distilled model look at, and what the head behind each says.

    python docs/figures/front.py --weights=W --image=a.jpg --image=b.jpg --out=a.png
    python docs/figures/front.py --weights=runs/quickstart --examples=3,14,15

W is what `deit predict --weights` takes: a run, a file, a published model's folder. --examples are
numbers of held-out images of the run's own data; without either, five of them evenly spaced. The
attention is that of the last block, averaged over its heads, of each token to the image's patches.
"""

import argparse
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from deit_jax import analysis
from deit_jax.analysis.classify import open_classifier
from deit_jax.analysis.predictions import pixels, softmax, spaced
from deit_jax.data.channels import as_colours
from deit_jax.data.sources.named import named_images
from deit_jax.data.sources.registry import open_dataset
from deit_jax.shapes import sides

INK = "#808894"  # is read on white and on black
COLOURS = {"class token": (255, 138, 61), "distillation token": (92, 160, 255)}
SIDE = 224  # pixels of a picture, about


def opened_images(weights: str, images: list[str], examples: str):
    """Return the weights, a source of images, their numbers, and their names where known."""
    opened = open_classifier(weights)
    if not (getattr(opened.model, "distilled", False) and opened.model.dist_head):
        raise SystemExit(f"{opened.name} has no distillation token and head")
    if opened.multi_label:
        raise SystemExit(f"--weights={weights}: has several labels an image; this draws one answer")
    if images:
        source = named_images(images, opened.reading.channels)
        return opened, source, np.arange(len(source)), None
    if opened.run is None:
        raise SystemExit(f"--weights={weights}: no run with data of its own; give --image=FILE")
    source = open_dataset(opened.run.config.data).eval
    given = [int(word) for word in examples.split(",")] if examples else spaced(len(source), 5)
    numbers = np.asarray(given)
    return opened, source, numbers, [opened.classes[source[i]["label"]] for i in numbers]


def look(opened, shown) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the attention [B rows columns] of each token and the probabilities of its head."""
    mean, std = (np.asarray(numbers, np.float32) for numbers in (opened.mean, opened.std))
    images = jnp.asarray((shown.astype(np.float32) / 255 - mean) / std)
    params = jax.tree.map(jnp.asarray, opened.variables["params"])
    heads = jax.device_get(opened.model.apply({"params": params}, images))
    maps = analysis.attention_maps(opened.model, params, images)[:, -1].mean(axis=1)
    rows, columns = opened.model.grid_size
    grids = np.asarray(maps[:, :2, 2:]).reshape(len(images), 2, rows, columns)
    answers = (softmax(np.asarray(x, np.float32)) for x in (heads.cls, heads.dist))
    seen = dict(zip(COLOURS, np.swapaxes(grids, 0, 1), strict=True))
    return seen, dict(zip(COLOURS, answers, strict=True))


def lit(picture: np.ndarray, grid: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Return a picture, darkened, lit in a colour where a token reads it."""
    height, width = picture.shape[:2]
    light = Image.fromarray(np.float32(grid / grid.max())).resize((width, height), Image.BICUBIC)
    light = np.clip(np.asarray(light), 0, 1)[..., None]
    grey = picture.astype(np.float32).mean(axis=-1, keepdims=True)
    lamp = np.asarray(colour, np.float32)
    mixed = (0.35 * grey) * (1 - light) + light * (0.45 * lamp + 0.55 * grey * lamp / 255)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def draw(opened, pictures, seen, answers, truth):
    """Return the figure: a column an image; the image, and below it each token."""
    figure, axes = plt.subplots(
        3, len(pictures), figsize=(1.85 * len(pictures) + 0.5, 6.5), squeeze=False
    )
    figure.subplots_adjust(0.045, 0.05, 0.995, 0.995, wspace=0.06, hspace=0.16)
    style = {"fontsize": 11, "labelpad": 4}
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for column, picture in enumerate(pictures):
        axes[0, column].imshow(picture)
        axes[0, column].set_xlabel(truth[column] if truth else "", **style, color=INK)
        for row, (token, colour) in enumerate(COLOURS.items(), 1):
            probability = answers[token][column]
            best = int(probability.argmax())
            axis = axes[row, column]
            axis.imshow(lit(picture, seen[token][column], colour))
            said = f"{opened.classes[best].split(',')[0]}  {probability[best]:.0%}"
            tint = tuple(0.82 * value / 255 for value in colour)
            axis.set_xlabel(said, **style, color=tint, fontweight="bold")
    for row, name in enumerate(["image", *COLOURS]):
        axes[row, 0].set_ylabel(name, **style, color=INK)
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="of a distilled model")
    parser.add_argument("--image", action="append", default=[], help="a file; may be repeated")
    parser.add_argument("--examples", default="", help="numbers of held-out images of the run")
    parser.add_argument("--out", default="docs/figures/front.png")
    values = parser.parse_args()
    opened, source, numbers, truth = opened_images(values.weights, values.image, values.examples)
    seen, answers = look(opened, pixels(source, numbers, opened))
    times = max(1, round(SIDE / max(sides(opened.image_size))))
    size = tuple(times * side for side in sides(opened.image_size))
    larger = types.SimpleNamespace(view=dataclasses.replace(opened.view, size=size))
    pictures = [as_colours(picture) for picture in pixels(source, numbers, larger)]
    figure = draw(opened, pictures, seen, answers, truth)
    figure.savefig(values.out, dpi=100, transparent=True)
    drawn = np.array(Image.open(values.out))
    # Steps of four between colours: half the bytes, and nothing that an eye sees.
    drawn[..., :3] = np.clip(np.round(drawn[..., :3] / 4) * 4, 0, 255)
    Image.fromarray(drawn).save(values.out, optimize=True)


if __name__ == "__main__":
    main()
