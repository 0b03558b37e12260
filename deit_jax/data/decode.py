"""From an example's bytes or array to an RGB crop in uint8, with Pillow's pixels.

The orientation that a camera notes in EXIF is left alone unless asked for: torchvision's and timm's
loaders, and so the published models, see photographs as they are stored. (Pillow turns TIFF files
in any case.) Pixels of more than 8 bits: depth.py.
"""

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from deit_jax.data import depth, turns
from deit_jax.data.decoders import Decoder, Pixels, Resize, Resized, resize_pillow
from deit_jax.errors import UserError

# Pillow only warns of images of up to twice its limit; together with their copies they take
# gigabytes. Set once, as warnings.catch_warnings is not for threads.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
LONGEST = 100  # times as long as wide; beyond, a file of bytes would be enlarged to gigabytes

Box = tuple[int, int, int, int]  # left, top, width, height


@dataclass(frozen=True)
class Reading:
    """How images are read and made square, alike in training and in evaluation: fields of `data`.

    `fill` is the colour beside what is padded. Unless told otherwise, images are read as the
    reference reads them.
    """

    resize: str = "crop"  # crop, squash or pad
    exif: bool = False
    bits: int = 0
    fill: tuple[int, int, int] = (0, 0, 0)


PLAIN = Reading()


def decode(image: bytes | np.ndarray, name: str, reading: Reading = PLAIN) -> Image.Image:
    """Return an RGB image; raise UserError with the example's name if it cannot be read."""
    try:
        if isinstance(image, np.ndarray):
            return _from_array(image, reading.bits)
        return _from_file(image, reading)
    except depth.DepthError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:  # damaged bytes make Pillow's readers raise almost anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if unknown else " ".join(str(error).split())
        raise UserError(f"{name}: not a readable image ({reason}); repair or remove it") from error


def _from_array(array: np.ndarray, bits: int) -> Image.Image:
    if array.dtype.kind in "iuf" and array.dtype != np.uint8:
        array = depth.as_bytes(array, bits)
    grey = array.ndim == 3 and array.shape[2] == 1
    return Image.fromarray(array[:, :, 0] if grey else array).convert("RGB")


def _from_file(file: bytes, reading: Reading) -> Image.Image:
    opened = Image.open(io.BytesIO(file))
    if opened.format == "EPS":
        raise ValueError("EPS, which only running it as a program could draw")
    image = depth.shallow(opened, file, reading.bits)
    if image.mode == "P":
        image = image.convert("RGBA")  # the same colours, without a warning on transparent ones
    image = image.convert("RGB")
    return turns.turned(image, turns.orientation(opened)) if reading.exif else image


def read(
    image: bytes | np.ndarray,
    name: str,
    decoder: Decoder,
    scratch: np.ndarray | None = None,
    reading: Reading = PLAIN,
) -> Pixels:
    """Return the pixels of an example; raise UserError with its name if it cannot be read.

    They may lie in `scratch`, bytes to be used again and again, if it is large enough. Ordinary
    JPEG files are read by libjpeg-turbo itself if the decoder says so, with the pixels of Pillow's
    own copy of it; all the rest, and what is not flawless, by Pillow.
    """
    if decoder.jpeg and isinstance(image, bytes) and image[:2] == b"\xff\xd8":
        try:
            pixels = _ordinary_jpeg(image, scratch)
        except ValueError:
            pixels = None  # Pillow decides whether the flaw matters, and puts it into words
        if pixels is not None:
            return _upright(pixels, image, name) if reading.exif else pixels
    return np.asarray(decode(image, name, reading))


def _ordinary_jpeg(file: bytes, scratch: np.ndarray | None) -> Pixels | None:
    """Return the pixels of an ordinary JPEG file, None where Pillow shall look at it."""
    import simplejpeg  # only who decodes needs it

    height, width, colours, _ = simplejpeg.decode_jpeg_header(file)
    enormous = height * width > (Image.MAX_IMAGE_PIXELS or math.inf)
    if colours not in ("YCbCr", "Gray") or enormous:
        return None
    fits = scratch is not None and scratch.nbytes >= height * width * 3
    return simplejpeg.decode_jpeg(file, "RGB", buffer=scratch if fits else None)


def _upright(pixels: Pixels, file: bytes, name: str) -> Resized:
    try:
        number = turns.orientation(Image.open(io.BytesIO(file)))  # reads the header alone
    except Exception as error:  # as in decode
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: not a readable image ({reason}); repair or remove it") from error
    return pixels if number == 1 else np.asarray(turns.turned(Image.fromarray(pixels), number))


def random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Return a random part of an image, `scale` of its area and `ratio` wide.

    Ten tries to fit, then the largest central part of an allowed ratio (torchvision's
    RandomResizedCrop).
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    w, h = max(1, w), max(1, h)  # which the ratio of a few pixels may round to none
    return (width - w) // 2, (height - h) // 2, w, h


def resized_crop(pixels: Pixels, box: Box, size: int, resize: Resize = resize_pillow) -> Resized:
    """Return a part of an image at size x size; nothing from outside the part enters it."""
    left, top, width, height = box
    return resize(pixels[top : top + height, left : left + width], size, size)


def simple_random_crop(
    pixels: Pixels,
    size: int,
    rng: np.random.Generator,
    resize: Resize = resize_pillow,
    squash: bool = False,
) -> Resized:
    """Return a random size x size square after resizing the shorter side to `size`.

    The resized image is first padded by its reflection, four pixels on each side (DeiT III's
    simple random crop). `squash` resizes both sides to `size`.
    """
    height, width, _ = pixels.shape
    if squash:
        resized = resize(pixels, size, size)
    else:
        left, top, width, height = _not_too_long(width, height)
        pixels = pixels[top : top + height, left : left + width]
        resized = resize(pixels, *_shorter_at(width, height, size))
    padded = np.pad(resized, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    top, left = (int(rng.integers(side - size + 1)) for side in padded.shape[:2])
    return padded[top : top + size, left : left + size]


def _shorter_at(width: int, height: int, short: int) -> tuple[int, int]:
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _not_too_long(width: int, height: int) -> Box:
    """Return the middle of an image that is far longer than wide, or else all of it."""
    w, h = min(width, LONGEST * height), min(height, LONGEST * width)
    return (width - w) // 2, (height - h) // 2, w, h


def resize_shorter(image: Image.Image, short: int) -> Image.Image:
    """Return the image with its shorter side at `short` pixels; bicubic with antialias."""
    left, top, width, height = _not_too_long(*image.size)
    if (width, height) != image.size:
        image = image.crop((left, top, left + width, top + height))
    return image.resize(_shorter_at(*image.size, short), Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: int, crop_ratio: float) -> Image.Image:
    """Return the centre at size x size after resizing the shorter side to size / crop_ratio.

    Bicubic with antialias: torchvision's Resize and CenterCrop, as the reference evaluates.
    """
    image = resize_shorter(image, int(size / crop_ratio))
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
