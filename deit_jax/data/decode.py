"""From an example's bytes or array to a crop in uint8, RGB unless asked for, with Pillow's pixels.

The orientation that a camera notes in EXIF is left alone unless asked for: torchvision's and timm's
loaders, and so the published models, see photographs as they are stored. (Pillow turns TIFF files
in any case.) Pixels of more than 8 bits: depth.py; other channels than three: channels.py.
"""

import contextlib
import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from deit_jax.data import channels, depth, turns
from deit_jax.data.decoders import Decoder, Pixels, Resize, Resized, resize_pillow
from deit_jax.errors import UserError
from deit_jax.shapes import Size, sides

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
    fill: tuple[int, ...] = (0, 0, 0)
    channels: int = 3


PLAIN = Reading()


def decode(image: bytes | np.ndarray, name: str, reading: Reading = PLAIN) -> Image.Image:
    """Return an RGB image; raise UserError with the example's name if it cannot be read."""
    with _explained(name):
        if isinstance(image, np.ndarray):
            return _from_array(image, reading.bits)
        return _from_file(image, reading)


def pixels_of(image: bytes | np.ndarray, name: str, reading: Reading = PLAIN) -> Pixels:
    """Return the pixels of an example with `reading.channels`; raise UserError as `decode` does."""
    if reading.channels == 3:
        return np.asarray(decode(image, name, reading))
    with _explained(name):
        return _channels_of(image, reading)


def _channels_of(image: bytes | np.ndarray, reading: Reading) -> Pixels:
    count = reading.channels
    if not isinstance(image, np.ndarray) and channels.is_array(image):
        image = channels.array_in(image)
    elif not isinstance(image, np.ndarray) and channels.is_stack(image, count):
        image = channels.tiff_in(image, count)
    if isinstance(image, np.ndarray):
        return channels.of_array(image, reading.bits, count)
    return channels.fitted(np.asarray(_from_file(image, reading)), count)


@contextlib.contextmanager
def _explained(name: str):
    """Raise UserError with the example's name for whatever goes wrong in reading it."""
    try:
        yield
    except channels.MixedChannels as error:
        raise channels.MixedChannels(f"{name}: {error}") from error
    except (depth.DepthError, UserError) as error:
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
    try:
        opened = Image.open(io.BytesIO(file))
    except UnidentifiedImageError:
        if not channels.is_tiff(file):
            raise
        return _from_array(channels.tiff_in(file, 3), reading.bits)  # floats of 16 or 64 bits, …
    if opened.format == "EPS":
        raise ValueError("EPS, which only running it as a program could draw")
    image = depth.shallow(opened, file, reading.bits)
    if image.mode == "P":
        image = image.convert("RGBA")  # the same colours, without a warning on transparent ones
    image = _with_alpha(image, opened) if reading.channels == 4 else image.convert("RGB")
    return turns.turned(image, turns.orientation(opened)) if reading.exif else image


def _with_alpha(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Return an image as RGBA; what made it shallow may have left its alpha behind."""
    if image.mode == "RGB" and opened.mode == "RGBA":
        image = image.copy()
        image.putalpha(opened.getchannel("A"))
    return image.convert("RGBA")


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
    fast = decoder.jpeg and reading.channels in (1, 3, 4)
    if fast and isinstance(image, bytes) and image[:2] == b"\xff\xd8":
        try:
            pixels = _ordinary_jpeg(image, scratch)
        except ValueError:
            pixels = None  # Pillow decides whether the flaw matters, and puts it into words
        if pixels is not None:
            pixels = _upright(pixels, image, name) if reading.exif else pixels
            return channels.fitted(pixels, reading.channels)
    return pixels_of(image, name, reading)


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


def resize_of(image: bytes | np.ndarray, decoder: Decoder, reading: Reading) -> Resize:
    """Return what resizes an example's parts: Pillow for arrays, and for other channels than RGB.

    Arrays are small and few: with Pillow, they look the same on every machine.
    """
    plain = isinstance(image, np.ndarray) or reading.channels != 3
    return resize_pillow if plain else decoder.resize


def resized_crop(pixels: Pixels, box: Box, size: Size, resize: Resize = resize_pillow) -> Resized:
    """Return a part of an image at a size; nothing from outside the part enters it."""
    left, top, width, height = box
    return resize(pixels[top : top + height, left : left + width], *sides(size)[::-1])


def simple_random_crop(
    pixels: Pixels,
    size: Size,
    rng: np.random.Generator,
    resize: Resize = resize_pillow,
    squash: bool = False,
) -> Resized:
    """Return a random part of a size after resizing the image to just cover it.

    The resized image is first padded by its reflection, four pixels on each side (DeiT III's
    simple random crop). `squash` resizes both sides to those of `size`.
    """
    height, width, _ = pixels.shape
    rows, columns = sides(size)
    if squash:
        resized = resize(pixels, columns, rows)
    else:
        left, top, width, height = _not_too_long(width, height)
        pixels = pixels[top : top + height, left : left + width]
        resized = resize(pixels, *_covering(width, height, rows, columns))
    padded = np.pad(resized, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    top = int(rng.integers(padded.shape[0] - rows + 1))
    left = int(rng.integers(padded.shape[1] - columns + 1))
    return padded[top : top + rows, left : left + columns]


def _covering(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the width and height at which an image just covers rows x columns.

    A square as torchvision's Resize does, which truncates; others as timm does, which rounds.
    """
    if rows != columns:
        ratio = min(height / rows, width / columns)
        return round(width / ratio), round(height / ratio)
    if width <= height:
        return rows, int(rows * height / width)
    return int(rows * width / height), rows


def _not_too_long(width: int, height: int) -> Box:
    """Return the middle of an image that is far longer than wide, or else all of it."""
    w, h = min(width, LONGEST * height), min(height, LONGEST * width)
    return (width - w) // 2, (height - h) // 2, w, h


def resize_shorter(image: Image.Image, size: Size) -> Image.Image:
    """Return the image just covering a size, the shorter side that of a square.

    Bicubic with antialias.
    """
    left, top, width, height = _not_too_long(*image.size)
    if (width, height) != image.size:
        image = image.crop((left, top, left + width, top + height))
    return image.resize(_covering(*image.size, *sides(size)), Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: Size, crop_ratio: float) -> Image.Image:
    """Return the centre of a size after resizing the image to cover size / crop_ratio.

    Bicubic with antialias: torchvision's Resize and CenterCrop, as the reference evaluates; of
    oblong sizes timm's ResizeKeepRatio.
    """
    rows, columns = sides(size)
    image = resize_shorter(image, (int(rows / crop_ratio), int(columns / crop_ratio)))
    left, top = round((image.width - columns) / 2), round((image.height - rows) / 2)
    return image.crop((left, top, left + columns, top + rows))
