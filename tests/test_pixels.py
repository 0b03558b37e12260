"""Compare the operations, as RandAugment and 3-Augment call them, with Pillow's.

Mean absolute difference from Pillow 13 in levels of 255, the worst over the photographs, levels
and signs below, measured with OpenCV 5.0 and the same with 4.10 except where given:

| operation | mean | largest |
|---|---|---|
| AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd | 0 | 0 |
| Color, Contrast, Brightness, Sharpness, grayscale | 0 | 0 |
| ShearX, ShearY | 0.002 | 1 |
| TranslateXRel, TranslateYRel (0.035 less than 1/100 pixel from a whole shift) | 0.003 | 1 |
| Rotate (OpenCV 4.10, which rounds positions to 1/32 pixel: 0.19, 8) | 0.053 | 2 |
| Gaussian blur | 0.00002 | 1 |

Grey values half way between two levels may round the other way (one pixel in 100,000 of noise),
and a blend that ends less than 1e-4 below a level reaches it: hence the bounds on Color, Sharpness.
"""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from skimage import data
from sklearn.datasets import load_sample_images

from deit_jax.data import image_ops
from deit_jax.data.augment import OPS

LEVELS = (0.0, 0.7, 2.4, 2.5, 4.1, 5.0, 7.3, 8.6, 9.0, 9.37, 10.0)
BICUBIC = {"resample": Image.Resampling.BICUBIC, "fillcolor": (124, 116, 104)}
BOUNDS = {"Rotate": 0.25, "Shear": 0.01, "Translate": 0.05, "Color": 0.002, "Sharpness": 0.002}


@pytest.fixture(scope="module")
def photos():
    """Four photographs of 224x224 and a wide one."""
    square = [*load_sample_images().images, data.astronaut(), data.coffee()]
    resized = [cv2.resize(photo, (224, 224), interpolation=cv2.INTER_AREA) for photo in square]
    return [*resized, cv2.resize(data.chelsea(), (250, 181), interpolation=cv2.INTER_AREA)]


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **BICUBIC)


def posterize(image, bits):
    # Pillow before 13 took 0 bits and returned black.
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def solarize_add(image, amount):
    return image.point([min(255, v + amount) if v < 128 else v for v in range(256)] * 3)


def enhance(kind, factor):
    return lambda image: kind(image).enhance(factor)


def pillow(name, level, sign):
    """Return timm's operation on a Pillow image, written out from its table of arguments."""
    part = level / 10
    up, away = part * 1.8 + 0.1, max(0.1, 1 + sign * part * 0.9)
    shear, shift = sign * part * 0.3, sign * part * 0.45
    return {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
        "Rotate": lambda image: image.rotate(sign * part * 30, **BICUBIC),
        "Posterize": lambda image: posterize(image, int(part * 4)),
        "PosterizeIncreasing": lambda image: posterize(image, 4 - int(part * 4)),
        "Solarize": lambda image: ImageOps.solarize(image, int(part * 256)),
        "SolarizeIncreasing": lambda image: ImageOps.solarize(image, 256 - int(part * 256)),
        "SolarizeAdd": lambda image: solarize_add(image, int(part * 110)),
        "Color": enhance(ImageEnhance.Color, up),
        "ColorIncreasing": enhance(ImageEnhance.Color, away),
        "Contrast": enhance(ImageEnhance.Contrast, up),
        "ContrastIncreasing": enhance(ImageEnhance.Contrast, away),
        "Brightness": enhance(ImageEnhance.Brightness, up),
        "BrightnessIncreasing": enhance(ImageEnhance.Brightness, away),
        "Sharpness": enhance(ImageEnhance.Sharpness, up),
        "SharpnessIncreasing": enhance(ImageEnhance.Sharpness, away),
        "ShearX": lambda image: affine(image, 1, shear, 0, 0, 1, 0),
        "ShearY": lambda image: affine(image, 1, 0, 0, shear, 1, 0),
        "TranslateXRel": lambda image: affine(image, 1, 0, shift * image.width, 0, 1, 0),
        "TranslateYRel": lambda image: affine(image, 1, 0, 0, 0, 1, shift * image.height),
    }[name]


def difference(ours, reference):
    """Return the mean and the largest absolute difference, in levels."""
    gap = np.abs(ours.astype(int) - np.asarray(reference).astype(int))
    return gap.mean(), gap.max()


@pytest.mark.parametrize("name", OPS)
def test_operation_matches_pillow(photos, name):
    bound = next((bound for start, bound in BOUNDS.items() if name.startswith(start)), 0.0)
    for photo in photos:
        before = photo.copy()
        for level in LEVELS:
            for sign in (1, -1):
                ours = OPS[name](photo, level, sign)
                assert ours.dtype == np.uint8
                mean, largest = difference(ours, pillow(name, level, sign)(Image.fromarray(photo)))
                assert mean <= bound, (level, sign)
                assert bound or largest == 0
        assert np.array_equal(photo, before)  # nothing is done in place


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 9)])
def test_small_and_flat_images(name, shape):
    # Equalize and AutoContrast have nothing to stretch here; the rest must not leave the image.
    flat = np.full((*shape, 3), image_ops.FILL, np.uint8)
    for level in LEVELS:
        reference = np.asarray(pillow(name, level, -1)(Image.fromarray(flat)))
        assert np.array_equal(OPS[name](flat, level, -1), reference), level


@pytest.mark.parametrize("value", [0, 1, 77, 128, 200, 254, 255])
def test_geometry_keeps_a_flat_image_flat(value, monkeypatch):
    """Dropping the fraction must not lose a level to float rounding."""
    monkeypatch.setattr(image_ops, "FILL", (value, value, value))
    flat = np.full((61, 84, 3), value, np.uint8)
    for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"):
        for level in LEVELS:
            assert np.array_equal(OPS[name](flat, level, 1), flat), (name, level)


def test_three_augment_parts_match_pillow(photos):
    for photo in photos:
        image = Image.fromarray(photo)
        assert (
            difference(image_ops.grayscale(photo), ImageOps.grayscale(image).convert("RGB"))[1] < 1
        )
        assert np.array_equal(image_ops.solarize(photo, 128), ImageOps.solarize(image, 128))
        for radius in (0.1, 0.3, 0.77, 1.23, 1.6, 1.97):
            reference = image.filter(ImageFilter.GaussianBlur(radius))
            mean, largest = difference(image_ops.gaussian_blur(photo, radius), reference)
            assert mean < 0.01, radius
            assert largest <= 1, radius
