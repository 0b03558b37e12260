"""From an example's bytes or array to an RGB crop in uint8, with Pillow's pixels.

The orientation that a camera notes in EXIF is left alone: torchvision's and timm's loaders, and so
the published models, see photographs as they are stored.
"""

import io
import math
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from deit_jax.data.decoders import Decoder, Pixels, Resize, Resized, resize_pillow
from deit_jax.errors import UserError

# Pillow only warns of images of up to twice its limit; together with their copies they take
# gigabytes. Set once, as warnings.catch_warnings is not for threads.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
LONGEST = 100  # times as long as wide; beyond, a file of bytes would be enlarged to gigabytes

Box = tuple[int, int, int, int]  # left, top, width, height


def decode(image: bytes | np.ndarray, name: str) -> Image.Image:
    """Return an RGB image; raise UserError with the example's name if it cannot be read."""
    try:
        if isinstance(image, np.ndarray):
            grey = image.ndim == 3 and image.shape[2] == 1
            return _to_rgb(Image.fromarray(image[:, :, 0] if grey else image))
        return _to_rgb(Image.open(io.BytesIO(image)))
    except Exception as error:  # damaged bytes make Pillow's readers raise almost anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if unknown else " ".join(str(error).split())
        raise UserError(f"{name}: not a readable image ({reason}); repair or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.format == "EPS":
        raise ValueError("EPS, which only running it as a program could draw")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16 bits, which convert() would clip at 255; Pillow itself reads 16-bit RGB this way.
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # the same colours, without a warning on transparent ones
    return image.convert("RGB")


def read(
    image: bytes | np.ndarray, name: str, decoder: Decoder, scratch: np.ndarray | None = None
) -> Pixels:
    """Return the pixels of an example; raise UserError with its name if it cannot be read.

    They may lie in `scratch`, bytes to be used again and again, if it is large enough. Ordinary
    JPEG files are read by libjpeg-turbo itself if the decoder says so, with the pixels of Pillow's
    own copy of it; all the rest, and what is not flawless, by Pillow.
    """
    if decoder.jpeg and isinstance(image, bytes) and image[:2] == b"\xff\xd8":
        import simplejpeg  # only who decodes needs it

        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
            enormous = height * width > (Image.MAX_IMAGE_PIXELS or math.inf)
            if colours in ("YCbCr", "Gray") and not enormous:
                fits = scratch is not None and scratch.nbytes >= height * width * 3
                return simplejpeg.decode_jpeg(image, "RGB", buffer=scratch if fits else None)
        except ValueError:
            pass  # Pillow decides whether the flaw matters, and puts it into words
    return np.asarray(decode(image, name))


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
    pixels: Pixels, size: int, rng: np.random.Generator, resize: Resize = resize_pillow
) -> Resized:
    """Return a random size x size square after resizing the shorter side to `size`.

    The resized image is first padded by its reflection, four pixels on each side (DeiT III's
    simple random crop).
    """
    height, width, _ = pixels.shape
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
