"""From an example's bytes or array to an RGB crop in uint8, with Pillow's pixels."""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from deit_jax.errors import UserError


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
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16 bits, which convert() would clip at 255; Pillow itself reads 16-bit RGB this way.
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # the same colours, without a warning on transparent ones
    return image.convert("RGB")


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Image.Image:
    """Return a random part of the image, `scale` of its area and `ratio` wide, at size x size.

    Ten tries to fit, then the largest central part of an allowed ratio (torchvision's
    RandomResizedCrop, bicubic with antialias).
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = width, height
        if width / height < ratio[0]:
            h = round(width / ratio[0])
        elif width / height > ratio[1]:
            w = round(height * ratio[1])
        left, top = (width - w) // 2, (height - h) // 2
    crop = image.crop((left, top, left + w, top + h))
    return crop.resize((size, size), Image.Resampling.BICUBIC)


def simple_random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Return a random size x size square after resizing the shorter side to `size`.

    The resized image is first padded by its reflection, four pixels on each side (DeiT III's
    simple random crop).
    """
    image = resize_shorter(image, size)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    top, left = (int(rng.integers(side - size + 1)) for side in padded.shape[:2])
    return Image.fromarray(padded[top : top + size, left : left + size])


def resize_shorter(image: Image.Image, short: int) -> Image.Image:
    """Return the image with its shorter side at `short` pixels; bicubic with antialias."""
    width, height = image.size
    if width <= height:
        resized = (short, int(short * height / width))
    else:
        resized = (int(short * width / height), short)
    return image.resize(resized, Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: int, crop_ratio: float) -> Image.Image:
    """Return the centre at size x size after resizing the shorter side to size / crop_ratio.

    Bicubic with antialias: torchvision's Resize and CenterCrop, as the reference evaluates.
    """
    image = resize_shorter(image, int(size / crop_ratio))
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
