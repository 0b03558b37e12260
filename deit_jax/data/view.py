"""What a model is shown of an image: whole or in part, by `data.resize`, at size x size.

crop    evaluation: the centre, after resizing the shorter side; training: random parts
squash  evaluation: the whole image, its sides resized to the same length; training: random parts,
        with augment.crop=simple of the squashed image
pad     evaluation: the whole image in its own shape, beside it the mean colour; training: random
        parts of the image padded to a square

timm's crop_mode center, squash and border, the latter two with crop_pct=1.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from deit_jax.data import decode
from deit_jax.data.decode import PLAIN, Box, Reading
from deit_jax.data.decoders import Pixels, Resize, Resized

SQUARE = 4096  # pixels a side of a padded image in training; larger ones are made smaller before


def reading_of(data) -> Reading:
    """Return how images are read and made square by a config's `data`."""
    red, green, blue = (round(255 * value) for value in data.mean)
    return Reading(data.resize, data.exif, data.bits, (red, green, blue))


@dataclass(frozen=True)
class EvalView:
    """What evaluation shows of an image. `crop_ratio` is for resize=crop alone."""

    size: int
    crop_ratio: float
    reading: Reading = PLAIN

    def __call__(self, image: bytes | np.ndarray, name: str) -> Resized:
        """Return an example's view; raise UserError with its name if it cannot be read."""
        return np.asarray(self.crop(decode.decode(image, name, self.reading)))

    def crop(self, image: Image.Image) -> Image.Image:
        """Return the view of an RGB image, with Pillow's pixels."""
        size = self.size
        if self.reading.resize == "squash":
            return image.resize((size, size), Image.Resampling.BICUBIC)
        if self.reading.resize == "pad":
            return _whole(image, size, self.reading.fill)
        return decode.centre_crop(image, size, self.crop_ratio)


def _whole(image: Image.Image, size: int, fill: tuple[int, int, int]) -> Image.Image:
    width, height = _longer_at(*image.size, size)
    square = Image.new("RGB", (size, size), fill)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


def _longer_at(width: int, height: int, long: int) -> tuple[int, int]:
    ratio = max(width, height) / long
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def random_view(
    pixels: Pixels,
    size: int,
    augment,
    rng: np.random.Generator,
    resize: Resize,
    reading: Reading = PLAIN,
) -> Resized:
    """Return a random part of an image as a config's `augment` says, not yet flipped."""
    pad, simple = reading.resize == "pad", augment.crop == "simple"
    if pad:
        pixels = _not_too_large(pixels, max(SQUARE, size), resize)
    height, width, _ = pixels.shape
    side = max(width, height)
    if simple:
        if pad:
            pixels = padded_part(pixels, (0, 0, side, side), reading.fill)
        squash = reading.resize == "squash"
        return decode.simple_random_crop(pixels, size, rng, resize, squash)
    if not pad:
        box = decode.random_box(width, height, rng, augment.crop_scale, augment.crop_ratio)
        return decode.resized_crop(pixels, box, size, resize)
    box = decode.random_box(side, side, rng, augment.crop_scale, augment.crop_ratio)
    return resize(padded_part(pixels, box, reading.fill), size, size)


def _not_too_large(pixels: Pixels, longest: int, resize: Resize) -> Resized:
    """Return an image whose sides are `longest` at most: padded, it takes the square of that."""
    height, width, _ = pixels.shape
    if max(width, height) <= longest:
        return pixels
    return resize(pixels, *_longer_at(width, height, longest))


def padded_part(pixels: Pixels, box: Box, fill: tuple[int, int, int]) -> Resized:
    """Return a part of the image padded to a square, without making the rest of the square."""
    rows, columns, _ = pixels.shape
    side = max(rows, columns)
    left, top, width, height = box
    left, top = left - (side - columns) // 2, top - (side - rows) // 2  # in the image itself
    x, y = slice(max(left, 0), left + width), slice(max(top, 0), top + height)
    inside = pixels[y.start : max(y.stop, 0), x.start : max(x.stop, 0)]
    if inside.shape[:2] == (height, width):
        return inside
    part = np.empty((height, width, 3), np.uint8)
    part[:] = fill
    y0, x0 = y.start - top, x.start - left
    part[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] = inside
    return part
