"""Figures of a report on one transformer: its tokens, attention, positions and filters."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from deit_jax import analysis
from deit_jax.analysis.inference import normalising
from deit_jax.data.sources.base import Source
from deit_jax.models.vit import VisionTransformer

BATCH = 16
TOKENS = ("cls", "dist")


def tokens(opened, images: UInt8[np.ndarray, "n H W C"]) -> dict[str, Any] | None:
    """Return the cosine of class and distillation token after every layer, None with one token.

    `cosines` begins with the tokens as they enter the first block; `learned_cosine` is that of the
    tokens alone, without their position embeddings (DeiT, section 5.2).
    """
    model, params = opened.model, opened.variables["params"]
    if not isinstance(model, VisionTransformer) or not model.distilled:
        return None
    cosines = normalising(opened, lambda params, x: _cosines(model, params, x))
    total: np.ndarray | float = 0.0
    params = jax.device_put(params)
    for i in range(0, len(images), BATCH):
        part = images[i : i + BATCH]
        total = total + len(part) * np.asarray(cosines(params, part), np.float64)
    return {
        "images": len(images),
        "learned_cosine": analysis.learned_cosine(params),
        "cosines": np.asarray(total / len(images)).tolist(),
    }


def _cosines(model, params, images):
    return analysis.token_cosines(analysis.token_features(model, params, images))


def attention(
    opened, source: Source, numbers: np.ndarray, images: UInt8[np.ndarray, "n H W C"]
) -> dict[str, Any] | None:
    """Return what the tokens read on a few images, as grids of patches; None without attention.

    `last_layer` is [token][head][row][column] of the last block's weights, `rollout`
    [token][row][column] of attention_rollout; the weights of the learned tokens are left out.
    """
    model = opened.model
    if not isinstance(model, VisionTransformer):
        return None
    prefix, grid = model.num_prefix_tokens, model.grid_size

    def look(params, images):
        maps = analysis.attention_maps(model, params, images)
        last = maps[0, -1, :, :prefix, prefix:].swapaxes(0, 1)
        mixed = analysis.rollout(maps)[0, :prefix, prefix:]
        return last.reshape(prefix, -1, *grid), mixed.reshape(prefix, *grid)

    look, params = normalising(opened, look), jax.device_put(opened.variables["params"])
    found = []
    for number, image in zip(numbers, images, strict=True):  # one at a time: maps are large
        last, mixed = look(params, image[None])
        found.append(
            {
                "example": int(number),
                "name": source.describe(int(number)),
                "class": class_of(source[int(number)]["label"], opened.classes),
                "last_layer": rounded(last),
                "rollout": rounded(mixed),
            }
        )
    return {"tokens": list(TOKENS[:prefix]), "layer": model.depth, "images": found}


def class_of(label: int | np.ndarray, classes: Sequence[str]) -> str:
    """Return the name of an image's class, or those of its several."""
    if isinstance(label, int):
        return classes[label]
    return ", ".join(classes[i] for i in np.flatnonzero(label).tolist()) or "no class"


def learned(opened) -> dict[str, Any]:
    """Return the grid of patches, the similarity of their positions and the embedding's filters.

    None in their place for a model that has none.
    """
    model, params = opened.model, opened.variables["params"]
    if not isinstance(model, VisionTransformer):
        return {"patch_grid": None, "position_similarity": None, "patch_filters": None}
    return {
        "patch_grid": list(model.grid_size),
        "position_similarity": rounded(analysis.position_similarity(model, params)),
        "patch_filters": rounded(analysis.patch_filters(params)),
    }


def rounded(values: jax.Array | np.ndarray) -> list:
    """Return nested lists with six decimals; what is not finite, which JSON lacks, is 0."""
    values = np.nan_to_num(np.asarray(values, np.float64), posinf=0, neginf=0)
    return np.round(values, 6).tolist()
