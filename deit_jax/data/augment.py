"""Augment uint8 RGB images on the host: RandAugment, 3-Augment and colour jitter.

What is drawn and in which order; what happens to the pixels is in image_ops.py. Every function is
pure: an image and random numbers in, a new image (or the same, where there is nothing to do) out.
Shapes: H W pixels.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import UInt8

from deit_jax.data import image_ops
from deit_jax.data.image_ops import Image

Augment = Callable[[Image, np.random.Generator], Image]

MAX_LEVEL = 10.0
_MOST_OPS = 100  # of RandAugment on an image: more leave nothing of it, and take for ever

# RandAugment: timm's operations as functions of a level in [0, 10] and a sign.
Op = Callable[[Image, float, int], Image]


def _steps(level: float, count: int) -> int:
    """Return how many of `count` whole steps the level reaches."""
    return int(level / MAX_LEVEL * count)


def _upwards(function: Callable[[Image, float], Image]) -> Op:
    """Make an original blend: its factor grows from 0.1 to 1.9."""
    return lambda image, level, sign: function(image, level / MAX_LEVEL * 1.8 + 0.1)


def _away(function: Callable[[Image, float], Image]) -> Op:
    """Make an "increasing" blend: its factor leaves 1, the image itself, for 0.1 or 1.9."""
    return lambda image, level, sign: function(image, max(0.1, 1 + sign * level / MAX_LEVEL * 0.9))


def _signed(function: Callable[[Image, float], Image], most: float, axis: int | None = None) -> Op:
    """Make a geometric operation of up to +-`most`, times the length of an axis if given."""
    return lambda image, level, sign: function(
        image, sign * level / MAX_LEVEL * most * (1 if axis is None else image.shape[axis])
    )


OPS: dict[str, Op] = {
    "AutoContrast": lambda image, level, sign: image_ops.autocontrast(image),
    "Equalize": lambda image, level, sign: image_ops.equalize(image),
    "Invert": lambda image, level, sign: image_ops.invert(image),
    "Rotate": _signed(image_ops.rotate, 30.0),
    "Posterize": lambda image, level, sign: image_ops.posterize(image, _steps(level, 4)),
    "PosterizeIncreasing": lambda image, level, sign: image_ops.posterize(
        image, 4 - _steps(level, 4)
    ),
    "Solarize": lambda image, level, sign: image_ops.solarize(image, _steps(level, 256)),
    "SolarizeIncreasing": lambda image, level, sign: image_ops.solarize(
        image, 256 - _steps(level, 256)
    ),
    "SolarizeAdd": lambda image, level, sign: image_ops.solarize_add(image, _steps(level, 110)),
    "Color": _upwards(image_ops.color),
    "ColorIncreasing": _away(image_ops.color),
    "Contrast": _upwards(image_ops.contrast),
    "ContrastIncreasing": _away(image_ops.contrast),
    "Brightness": _upwards(image_ops.brightness),
    "BrightnessIncreasing": _away(image_ops.brightness),
    "Sharpness": _upwards(image_ops.sharpness),
    "SharpnessIncreasing": _away(image_ops.sharpness),
    "ShearX": _signed(image_ops.shear_x, 0.3),
    "ShearY": _signed(image_ops.shear_y, 0.3),
    "TranslateXRel": _signed(image_ops.translate_x, 0.45, axis=1),
    "TranslateYRel": _signed(image_ops.translate_y, 0.45, axis=0),
}

ORIGINAL_OPS = tuple(name for name in OPS if not name.endswith("Increasing"))
INCREASING_OPS = tuple(
    f"{name}Increasing" if f"{name}Increasing" in OPS else name for name in ORIGINAL_OPS
)


@dataclass(frozen=True)
class RandAugment:
    """Apply random operations, drawn uniformly with replacement, as timm's `rand-...` does.

    Each is applied with probability `prob`, at a fresh level from N(magnitude, std), or from
    U(0, magnitude) where std is infinite, clipped to [0, 10], and with a random sign.
    One difference from timm on Pillow 13: at level 10 PosterizeIncreasing keeps 0 bits, which
    Pillow now refuses; here the image turns black, as with the Pillow DeiT was trained with.
    """

    names: tuple[str, ...] = INCREASING_OPS
    magnitude: float = MAX_LEVEL
    std: float = 0.0
    num_ops: int = 2
    prob: float = 0.5
    grey: bool = False  # images of three equal channels, which they stay

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        image = np.ascontiguousarray(image)
        for index in rng.integers(len(self.names), size=self.num_ops):
            if rng.random() < self.prob:
                level, sign = self.level(rng), 1 if rng.random() < 0.5 else -1
                image = OPS[self.names[index]](image, level, sign)
                image = image_ops.grayscale(image) if self.grey else image
        return image

    def level(self, rng: np.random.Generator) -> float:
        """Draw a level in [0, 10]."""
        if math.isinf(self.std):
            level = rng.uniform(0.0, self.magnitude)
        else:
            level = rng.normal(self.magnitude, self.std)
        return min(max(level, 0.0), MAX_LEVEL)


@dataclass(frozen=True)
class ColorJitter:
    """Scale brightness, contrast and saturation by U(max(0, 1-s), 1+s) each, in random order."""

    strength: float

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        image = np.ascontiguousarray(image)
        factors = rng.uniform(max(0.0, 1.0 - self.strength), 1.0 + self.strength, size=3)
        for index in rng.permutation(3):
            image = (image_ops.brightness, image_ops.contrast, image_ops.color)[index](
                image, float(factors[index])
            )
        return image


def three_augment(image: Image, rng: np.random.Generator) -> Image:
    """Apply exactly one of grayscale, solarize at 128 or Gaussian blur, U(0.1, 2) (DeiT III)."""
    image = np.ascontiguousarray(image)
    choice, radius = rng.integers(3), rng.uniform(0.1, 2.0)
    if choice == 0:
        return image_ops.grayscale(image)
    return image_ops.solarize(image, 128) if choice == 1 else image_ops.gaussian_blur(image, radius)


@dataclass(frozen=True)
class Chain:
    """Apply augmentations one after the other; none returns the image itself."""

    steps: tuple[Augment, ...]

    def __call__(
        self, image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "H W C"]:
        for step in self.steps:
            image = step(image, rng)
        return image


def parse_rand_augment(spec: str) -> RandAugment:
    """Read timm's grammar: `rand` and, in any order, -m9 -n2 -p0.5 -mstd0.5 -inc1.

    m is the magnitude (default 10), n the operations per image (2), p the probability of each
    (0.5), mstd the deviation of the level (0; above 100 the level is uniform in [0, m]), inc
    whether the blends grow stronger with the level (0). Raises ValueError, naming the token.
    """
    values = {"m": MAX_LEVEL, "n": 2, "p": 0.5, "mstd": 0.0, "inc": 0}
    for token in spec.split("-")[1:]:
        if token[:1] in ("w", "t"):
            raise ValueError(f"{token!r} in {spec!r}: weighted choices are not supported")
        match = re.fullmatch(r"(m|n|inc)(\d+)|(p|mstd)(\d+(?:\.\d+)?|inf)", token)
        if not match or len(token) > 20:  # int() refuses thousands of digits in its own words
            raise ValueError(f"unknown token {token!r} in {spec!r}: use m9 n2 p0.5 mstd0.5 inc1")
        key, number = match[1] or match[3], match[2] or match[4]
        values[key] = type(values[key])(number)
    for key, most in (("n", _MOST_OPS), ("m", 100)):
        if values[key] > most:
            raise ValueError(f"{key} in {spec!r:.80} must be at most {most}")
    if values["p"] > 1:
        raise ValueError(f"p in {spec!r} must be a probability, at most 1")
    std = math.inf if values["mstd"] > 100 else values["mstd"]
    names = INCREASING_OPS if values["inc"] else ORIGINAL_OPS
    return RandAugment(names, values["m"], std, int(values["n"]), values["p"])


@dataclass(frozen=True)
class OfGrey:
    """Augment an image of one channel [H W 1] as if it had three equal ones."""

    augment: Augment

    def __call__(
        self, image: UInt8[np.ndarray, "H W 1"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "H W 1"]:
        three = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_GRAY2RGB)
        return image_ops.luma(np.ascontiguousarray(self.augment(three, rng)))[:, :, None]


def make_augment(spec: str, color_jitter: float = 0.0, channels: int = 3) -> Augment:
    """Return the augmentation `spec` names: "" (none), "rand-..." or "3aug".

    Colour jitter of the given strength follows, except after "rand-...", which replaces it (timm
    and DeiT). Images are RGB, or grey with one of `channels`; of other channels only "" is known.
    Raises ValueError for any other spec or a negative strength.
    """
    if channels == 1:
        augment = make_augment(spec, color_jitter)
        if isinstance(augment, RandAugment):
            augment = replace(augment, grey=True)
        return augment if augment == Chain(()) else OfGrey(augment)
    if color_jitter < 0:
        raise ValueError(f"color_jitter must not be negative, got {color_jitter}")
    if spec.split("-")[0] == "rand":
        return parse_rand_augment(spec)
    if spec not in ("", "3aug", "3-augment", "three"):
        raise ValueError(f"unknown augmentation {spec!r}: use '', 'rand-m9-mstd0.5-inc1' or '3aug'")
    steps = (three_augment,) if spec else ()
    return Chain((*steps, ColorJitter(color_jitter)) if color_jitter else steps)
