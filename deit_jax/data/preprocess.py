"""Images for a model's `apply`, for people who have no config: notebooks and services."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from deit_jax.data.view import EvalView
from deit_jax.errors import UserError
from deit_jax.shapes import Size
from deit_jax.storage import backend, to_path

AnyImage = str | Path | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class InputSpec:
    """What weights expect of images: the view of them, then (pixel / 255 - mean) / std.

    `mean` and `std` have a number for each channel.
    """

    view: EvalView
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_size(self) -> Size:
        """Pixels: a side of a square, or (height, width)."""
        return self.view.size

    @property
    def crop_ratio(self) -> float:
        """The model's size by that which the image is resized to before its centre is taken."""
        return self.view.crop_ratio


def preprocess(
    images: AnyImage | Sequence[AnyImage], spec: InputSpec
) -> Float[np.ndarray, "B H W C"]:
    """Return float32 images as the weights expect them: resized, cropped and normalised.

    An image is the path of a file, the bytes of one, a Pillow image, or an array [H W] or [H W C]:
    uint8, or deeper as data/depth.py understands it. Raise UserError with the name of one that
    cannot be read.
    """
    several = [images] if isinstance(images, AnyImage) else list(images)
    if not several:
        raise UserError("preprocess: no images given")
    pixels = np.stack([_view(image, f"image {i}", spec.view) for i, image in enumerate(several)])
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def _view(image: AnyImage, name: str, view: EvalView) -> np.ndarray:
    if isinstance(image, str | Path):
        name, image = str(image), read_file(image)
    elif isinstance(image, Image.Image):
        kept = image.mode in ("L", "RGB") or (image.mode == "RGBA" and view.reading.channels == 4)
        image = np.asarray(image if kept else image.convert("RGB"))
    return view(image, name)


def read_file(path: str | Path) -> bytes:
    """Return the content of an image's file; raise UserError with its name if it is not there."""
    try:
        return backend(to_path(path)).read(to_path(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
