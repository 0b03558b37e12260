"""Examples to click on: images of a run's evaluation data, written out as files."""

import dataclasses
import io
import logging
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from deit_jax.analysis.predictions import spaced
from deit_jax.analysis.transformer import class_of
from deit_jax.data import decode
from deit_jax.data.channels import as_colours
from deit_jax.data.sources.base import Source
from deit_jax.data.sources.registry import open_dataset
from deit_jax.demo import pictures
from deit_jax.errors import UserError
from deit_jax.storage import backend
from deit_jax.weights.fit import LoadedWeights

log = logging.getLogger("deit_jax")

IMAGES, SMALL = "examples", "thumbnails"  # folders


@dataclasses.dataclass(frozen=True)
class Example:
    """An image file, what a browser shows of it, and its class in the data."""

    file: str
    thumbnail: str
    truth: str


def write_examples(models: Sequence[LoadedWeights], count: int, folder: Path) -> list[Example]:
    """Write some evenly spaced images of the first run whose evaluation data is here.

    They lie below `folder`. None, with a line in the log, where there is no such data.
    """
    runs = [opened for opened in models if opened.run is not None]
    if not count:
        return []
    if not runs:
        log.info("no examples: only the workdir of a run says what it is evaluated on")
    for opened in runs:
        try:
            dataset = open_dataset(opened.run.config.data)  # type: ignore[union-attr]
            found = _write(opened, dataset.eval, dataset.classes, count, folder)
        except (UserError, OSError) as error:
            log.warning("no examples from %s: %s", opened.source, error)
            continue
        if found:
            return found
        log.warning("no examples from %s: none of its images can be read", opened.source)
    return []


def _write(
    opened: LoadedWeights, source: Source, classes: Sequence[str], count: int, folder: Path
) -> list[Example]:
    for name in (IMAGES, SMALL):
        backend(folder).make_folder(folder / name)
    found = []
    for number in spaced(len(source), count).tolist() if len(source) else []:
        example, name = source[number], source.describe(number)
        try:
            view = opened.view(example["image"], name)
            data, ending = _as_file(example["image"], name, opened)
        except UserError as error:
            log.warning("left out of the examples: %s", error)
            continue
        file = f"{IMAGES}/{number}{ending}"
        small = f"{SMALL}/{number}.png"
        backend(folder).write(folder / file, data)
        backend(folder).write(folder / small, _png(pictures.thumbnail(as_colours(view))))
        found.append(Example(file, small, class_of(example["label"], classes)))
    return found


def _as_file(image: bytes | np.ndarray, name: str, opened: LoadedWeights) -> tuple[bytes, str]:
    """Return a file of which the same pixels are read, and its ending."""
    if isinstance(image, bytes):
        ending = PurePath(name).suffix
        return image, ending if ending[1:].isalnum() else _ending(image)
    pixels = decode.pixels_of(image, name, opened.reading)
    if pixels.shape[2] in (1, 3, 4):
        return _png(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), ".png"
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue(), ".npy"


def _ending(image: bytes) -> str:
    return {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"\x93N": ".npy"}.get(image[:2], ".img")


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
