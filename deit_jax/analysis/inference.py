"""Any number of images through a model, in batches that are loaded ahead: memory stays the same."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from deit_jax.configs import base
from deit_jax.data.batches import EvalBatches
from deit_jax.data.loader import load
from deit_jax.data.sources.base import Source
from deit_jax.models.preprocess import normalise
from deit_jax.parallel import sharding
from deit_jax.train import memory

BATCH = 64  # images a device takes at a time
PREFETCH = 4  # batches loaded ahead


def normalising(opened, function: Callable) -> Callable:
    """Return a compiled `function(weights, images)` of uint8 images."""
    return jax.jit(lambda w, x: function(w, normalise(x, opened.mean, opened.std)))


class Made(NamedTuple):
    """What was made of a batch of so many `images`: those that can be read, by their numbers."""

    numbers: Int[np.ndarray, "n"]
    values: Any  # arrays [n …]
    labels: np.ndarray
    images: int


def stream(
    opened, source: Source, function: Callable, title: str = "", of: str = "the answers"
) -> Iterator[Made]:
    """Iterate over what is made of the images of a source, in its order, a batch after the other.

    `function(variables, images)` takes uint8 images [B H W C] on the devices and returns arrays
    [B …]. Images that cannot be read are left out `of` what is made, each named once in the log.
    With a `title` there is a progress bar.
    """
    mesh = sharding.make_mesh(base.get_config().mesh, jax.local_devices())
    count, devices = len(source), mesh.size
    size = devices * min(BATCH, -(-count // devices))
    batches = EvalBatches(source, size, opened.view, range(size), True, of)
    variables = jax.device_put(opened.variables, sharding.replicated(mesh))
    waiting: tuple[int, dict[str, np.ndarray], Any] | None = None

    def taken(step: int, about: dict[str, np.ndarray], made: Any) -> Made:
        valid, first = about["valid"], step * size
        values = jax.tree.map(lambda x: x[valid], jax.device_get(made))
        numbers = first + np.flatnonzero(valid)
        return Made(numbers, values, about["label"][valid], min(size, count - first))

    bar = tqdm(total=count, unit="image", desc=title, leave=False, disable=None if title else True)
    with contextlib.closing(_loaded(batches)) as loader, bar, _explained():
        for step, batch in enumerate(loader):
            about = {key: batch[key].copy() for key in ("valid", "label")}  # its memory is lent
            images = sharding.to_devices({"image": batch["image"]}, mesh, size)["image"]
            del batch
            made = function(variables, images)  # begun, while the one before is taken
            if waiting is not None:
                yield taken(*waiting)
            waiting = step, about, made
            bar.update(min(size, count - step * size))
        if waiting is not None:
            yield taken(*waiting)


def _loaded(batches: EvalBatches):
    """Iterate over the batches, by threads where there are several."""
    if len(batches) > 1:
        return load(batches, 0, len(batches), threads=0, prefetch=PREFETCH)
    return (batches(step) for step in range(len(batches)))


def _explained():
    return memory.explained("prediction", "the model does not fit this device; take a smaller one")
