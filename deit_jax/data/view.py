"""What a model is shown of an image: whole or in part, by `data.resize`, at the model's size.

crop    evaluation: the centre, after resizing the shorter side; training: random parts
squash  evaluation: the whole image, both sides resized to the model's; training: random parts,
        with augment.crop=simple of the squashed image
pad     evaluation: the whole image in its own shape, beside it the mean colour; training: random
        parts of the image padded to a square, or to the shape of oblong inputs

timm's crop_mode center, squash and border, the latter two with crop_pct=1.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from deit_jax.data import decode
from deit_jax.data.decode import PLAIN, Box, Reading
from deit_jax.data.decoders import Pixels, Resize, Resized
from deit_jax.shapes import Size, per_channel, sides

SQUARE = 4096  # pixels a side of a padded image in training; larger ones are made smaller before


def reading_of(data) -> Reading:
    """Return how images are read and made square by a config's `data`."""
    fill = tuple(round(255 * value) for value in per_channel(data.mean, data.channels))
    return Reading(data.resize, data.exif, data.bits, fill, data.channels)


@dataclass(frozen=True)
class EvalView:
    """What evaluation shows of an image. `crop_ratio` is for resize=crop alone."""

    size: Size
    crop_ratio: float
    reading: Reading = PLAIN

    def __call__(self, image: bytes | np.ndarray, name: str) -> Resized:
        """Return an example's view; raise UserError with its name if it cannot be read."""
        if self.reading.channels == 3:
            return np.asarray(self.crop(decode.decode(image, name, self.reading)))
        bands = np.moveaxis(decode.pixels_of(image, name, self.reading), -1, 0)
        views = (
            self.crop(Image.fromarray(np.ascontiguousarray(band)), fill)
            for band, fill in zip(bands, self.reading.fill, strict=True)
        )
        return np.stack([np.asarray(view) for view in views], axis=-1)

    def crop(self, image: Image.Image, fill: int | None = None) -> Image.Image:
        """Return the view of an RGB image, or of one channel with its `fill`; Pillow's pixels."""
        if self.reading.resize == "squash":
            return image.resize(sides(self.size)[::-1], Image.Resampling.BICUBIC)
        if self.reading.resize == "pad":
            return _whole(image, self.size, self.reading.fill if fill is None else fill)
        return decode.centre_crop(image, self.size, self.crop_ratio)


def _whole(image: Image.Image, size: Size, fill: int | tuple[int, ...]) -> Image.Image:
    rows, columns = sides(size)
    width, height = _scaled(*image.size, max(image.width / columns, image.height / rows))
    whole = Image.new(image.mode, (columns, rows), fill)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    whole.paste(resized, ((columns - width) // 2, (rows - height) // 2))
    return whole


def _scaled(width: int, height: int, ratio: float) -> tuple[int, int]:
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _canvas(width: int, height: int, size: Size) -> tuple[int, int]:
    """Return the width and height of the least canvas of a size's shape that holds an image."""
    rows, columns = sides(size)
    return max(width, round(height * columns / rows)), max(height, round(width * rows / columns))


def random_view(
    pixels: Pixels,
    size: Size,
    augment,
    rng: np.random.Generator,
    resize: Resize,
    reading: Reading = PLAIN,
) -> Resized:
    """Return a random part of an image as a config's `augment` says, not yet flipped."""
    pad, simple = reading.resize == "pad", augment.crop == "simple"
    if pad:
        pixels = _not_too_large(pixels, size, resize)
    height, width, _ = pixels.shape
    canvas = _canvas(width, height, size)
    if simple:
        if pad:
            pixels = padded_part(pixels, (0, 0, *canvas), reading.fill, canvas)
        squash = reading.resize == "squash"
        return decode.simple_random_crop(pixels, size, rng, resize, squash)
    if not pad:
        box = decode.random_box(width, height, rng, augment.crop_scale, augment.crop_ratio)
        return decode.resized_crop(pixels, box, size, resize)
    box = decode.random_box(*canvas, rng, augment.crop_scale, augment.crop_ratio)
    return resize(padded_part(pixels, box, reading.fill, canvas), *sides(size)[::-1])


def _not_too_large(pixels: Pixels, size: Size, resize: Resize) -> Resized:
    """Return an image whose canvas has sides of SQUARE at most, or of the size itself."""
    height, width, _ = pixels.shape
    longest, side = max(SQUARE, *sides(size)), max(_canvas(width, height, size))
    if side <= longest:
        return pixels
    return resize(pixels, *_scaled(width, height, side / longest))


def padded_part(
    pixels: Pixels, box: Box, fill: tuple[int, ...], canvas: tuple[int, int] | None = None
) -> Resized:
    """Return a part of the image padded to a canvas (width, height), without making the rest of it.

    The canvas is a square where it is not given.
    """
    rows, columns, channels = pixels.shape
    across, down = canvas or (max(rows, columns),) * 2
    left, top, width, height = box
    left, top = left - (across - columns) // 2, top - (down - rows) // 2  # in the image itself
    x, y = slice(max(left, 0), left + width), slice(max(top, 0), top + height)
    inside = pixels[y.start : max(y.stop, 0), x.start : max(x.stop, 0)]
    if inside.shape[:2] == (height, width):
        return inside
    part = np.empty((height, width, channels), np.uint8)
    part[:] = fill
    y0, x0 = y.start - top, x.start - left
    part[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] = inside
    return part
