"""Augment uint8 RGB images on the host: RandAugment, 3-Augment and colour jitter.

Pixels follow Pillow, which the reference uses: tables and blends are computed as Pillow computes
them, geometric operations use its pixel centres, its bicubic kernel and its truncation. What
differs, and by how much, is in tests/test_augment.py. Every function is pure: an image and its
arguments in, a new image out (or the same array where there is nothing to do), no state. Whoever
runs the workers limits OpenCV's own threads.
Shapes: H W pixels.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

Image = UInt8[np.ndarray, "H W 3"]
Augment = Callable[[Image, np.random.Generator], Image]

FILL = (124, 116, 104)  # ImageNet's mean colour, for what a geometric operation uncovers
MAX_LEVEL = 10.0

# ITU-R 601 luma in Pillow's 16-bit fixed point. Any weighted sum of bytes fits a float32 mantissa.
_LUMA = np.array([[19595, 38470, 7471]], np.float32) / 65536
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13

# Pillow drops the fraction where OpenCV rounds to nearest. The excess over -1/2 is above the error
# of a float32 sum, so that what should be a whole number does not lose one.
_TRUNCATE = -0.5 + 1e-4


# Tables: exactly Pillow's bytes.
def _lookup(image: Image, table: np.ndarray) -> Image:
    """Map bytes through a table of 256 values, or of 256 values for each channel [256 3]."""
    return cv2.LUT(image, table.reshape(256, 1, -1).astype(np.uint8))


def invert(image: Image) -> Image:
    """Replace every value v by 255 - v."""
    return cv2.bitwise_not(image)


def posterize(image: Image, bits: int) -> Image:
    """Keep the `bits` most significant bits, 0 to 8; with 0 the image is black."""
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: Image, threshold: int) -> Image:
    """Invert the values at or above the threshold, 0 to 256."""
    mask = cv2.threshold(image, threshold - 1, 255, cv2.THRESH_BINARY)[1]
    return cv2.bitwise_xor(image, mask)


def solarize_add(image: Image, amount: int) -> Image:
    """Add the amount, 0 to 128, to the values below 128."""
    values = np.arange(256)
    return _lookup(image, np.where(values < 128, values + amount, values))


def autocontrast(image: Image) -> Image:
    """Stretch each channel's range to [0, 255]."""
    low = image.min(axis=0).min(axis=0).astype(np.float64)
    high = image.max(axis=0).max(axis=0).astype(np.float64)
    flat = high <= low
    scale = 255.0 / np.where(flat, 1.0, high - low)
    values = np.arange(256)[:, None]
    table = np.clip((values * scale - low * scale).astype(np.int64), 0, 255)
    return _lookup(image, np.where(flat, values, table))


def equalize(image: Image) -> Image:
    """Flatten each channel's histogram with Pillow's integer steps (ImageOps.equalize)."""
    table = np.tile(np.arange(256)[:, None], (1, 3))
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        used = counts[counts > 0]
        step = (used.sum() - used[-1]) // 255
        if step:  # a single colour, or too few pixels for one step, stays as it is
            table[:, channel] = (step // 2 + np.cumsum(counts) - counts) // step
    return _lookup(image, np.minimum(table, 255))


# Blends: degenerate + factor * (image - degenerate), with the fraction dropped.
def luma(image: Image) -> UInt8[np.ndarray, "H W"]:
    """Return Pillow's grey value, (19595 R + 38470 G + 7471 B) / 65536 to the nearest."""
    return cv2.transform(image, _LUMA)


def grayscale(image: Image) -> Image:
    """Return the grey image in three equal channels."""
    return cv2.cvtColor(luma(image), cv2.COLOR_GRAY2RGB)


def _blend_constant(image: Image, constant: int, factor: float) -> Image:
    """Move away from a constant colour; in Pillow's float32, so that the bytes are the same."""
    constant, factor = np.float32(constant), np.float32(factor)
    table = constant + factor * (np.arange(256, dtype=np.float32) - constant)
    return _lookup(image, np.clip(table, 0, 255))


def brightness(image: Image, factor: float) -> Image:
    """Scale towards black (0), the image (1) and beyond."""
    return _blend_constant(image, 0, factor)


def contrast(image: Image, factor: float) -> Image:
    """Scale around the mean grey value: none (0), the image (1) and beyond."""
    grey = luma(image)
    return _blend_constant(image, int(cv2.sumElems(grey)[0] / grey.size + 0.5), factor)


def color(image: Image, factor: float) -> Image:
    """Scale the saturation: grey (0), the image (1) and beyond."""
    return cv2.addWeighted(image, factor, grayscale(image), 1 - factor, _TRUNCATE)


def sharpness(image: Image, factor: float) -> Image:
    """Blend with a 3x3 smoothed image: smooth (0), the image (1), sharper beyond."""
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    # Pillow's 3x3 filter leaves the outermost pixels as they are.
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        smooth[edge] = image[edge]
    return cv2.addWeighted(image, factor, smooth, 1 - factor, _TRUNCATE)


def gaussian_blur(image: Image, radius: float) -> Image:
    """Blur with three box filters along each axis, as Pillow does; radius is sigma in pixels."""
    variance = radius * radius / 3
    # Gwosdek et al. 2011, eqs. 7, 11 and 14: a box with a fractional weight at either end.
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) ** 2)
    kernel = np.full((1, 2 * whole + 3), 1 / (2 * (whole + part) + 1), np.float32)
    kernel[0, [0, -1]] *= part
    for taps in 3 * [kernel] + 3 * [kernel.T]:
        image = cv2.filter2D(image, -1, taps, borderType=cv2.BORDER_REPLICATE)
    return image


# Geometry. A pixel's centre is at +1/2; the value comes from the 4x4 pixels around the source
# point, the border's repeated outside; a pixel whose source point lies outside is filled.
def _cubic_taps(fraction: np.ndarray | float) -> np.ndarray:
    """Return the weights [..., 4] at -1, 0, 1, 2 of Keys' cubic with a = -1, as Pillow warps.

    OpenCV's has a = -3/4 and Pillow's own resize a = -1/2.
    """
    d = np.asarray(fraction)
    inner, outer = 1 - d, d * (1 - d)
    return np.stack([-outer * inner, inner * (1 + outer), d * (1 + outer), -outer * d], axis=-1)


def _filled(height: int, width: int) -> Image:
    """Return an image of FILL."""
    row = np.tile(np.array(FILL, np.uint8), width)
    return np.broadcast_to(row, (height, 3 * width)).copy().reshape(height, width, 3)


def _blocks(height: int) -> list[slice]:
    """Cut the rows into blocks whose temporary arrays stay in the cache and off mmap."""
    return [slice(top, top + 32) for top in range(0, height, 32)]


def translate_x(image: Image, pixels: float) -> Image:
    """Move the content left by a number of pixels, whole or not."""
    width = image.shape[1]
    shift = math.floor(pixels)
    taps = _cubic_taps(pixels - shift).astype(np.float32)[None]
    # One column of margin, as the first source point may lie left of the first pixel's centre.
    padded = cv2.copyMakeBorder(image, 0, 0, 1, 0, cv2.BORDER_REPLICATE)
    moved = cv2.filter2D(
        padded, -1, taps, anchor=(1, 0), delta=_TRUNCATE, borderType=cv2.BORDER_REPLICATE
    )
    out = _filled(*image.shape[:2])
    first = max(0, math.ceil(-pixels - 0.5))
    last = min(width, math.ceil(width - pixels - 0.5))
    if first < last:
        out[:, first:last] = moved[:, first + shift + 1 : last + shift + 1]
    return out


def shear_x(image: Image, factor: float) -> Image:
    """Move each row left by factor times its height: x' = x + factor * y."""
    height, width, _ = image.shape
    shift = factor * (np.arange(height) + 0.5)
    whole = np.floor(shift).astype(np.int64)
    taps = _cubic_taps(shift - whole).astype(np.float32)
    # Each row is one run of bytes in the padded image, starting where its shift says.
    margin = math.ceil(abs(factor) * height) + 2
    padded = cv2.copyMakeBorder(image, 0, 0, margin, margin, cv2.BORDER_REPLICATE)
    runs = np.lib.stride_tricks.sliding_window_view(padded.reshape(-1), 3 * (width + 3))
    starts = np.arange(height) * (width + 2 * margin) + margin + whole - 1
    sheared = np.empty((height, 3 * width), np.uint8)
    for block in _blocks(height):
        rows = runs[3 * starts[block]].astype(np.float32)
        total = rows[:, : 3 * width] * taps[block, :1]
        for k in (1, 2, 3):
            total += rows[:, 3 * k : 3 * (k + width)] * taps[block, k : k + 1]
        sheared[block] = cv2.add(total, _TRUNCATE, dtype=cv2.CV_8U)
    source = np.arange(width) + 0.5 + shift[:, None]
    inside = (source >= 0) & (source < width)
    return cv2.copyTo(sheared.reshape(image.shape), inside.view(np.uint8), _filled(height, width))


def translate_y(image: Image, pixels: float) -> Image:
    """Move the content up by a number of pixels, whole or not."""
    return cv2.transpose(translate_x(cv2.transpose(image), pixels))


def shear_y(image: Image, factor: float) -> Image:
    """Move each column up by factor times its distance from the left: y' = y + factor * x."""
    return cv2.transpose(shear_x(cv2.transpose(image), factor))


def rotate(image: Image, degrees: float) -> Image:
    """Rotate counter-clockwise about the centre, keeping the size."""
    height, width, _ = image.shape
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x = np.arange(width) + 0.5 - width / 2
    y = (np.arange(height) + 0.5 - height / 2)[:, None]
    pixels, out = image.astype(np.float32), _filled(height, width)
    for block in _blocks(height):
        map_x = (cos * x - sin * y[block] + (width / 2 - 0.5)).astype(np.float32)
        map_y = (sin * x + cos * y[block] + (height / 2 - 0.5)).astype(np.float32)
        inside = (map_x >= -0.5) & (map_x < width - 0.5) & (map_y >= -0.5) & (map_y < height - 0.5)
        # The kernel is linear in a, so a = -1 is (4 K(-3/4) - K(0)) / 3, up to a negligible cross
        # term in two dimensions; and K(0) is linear interpolation of a smoothstepped fraction.
        cubic = cv2.remap(pixels, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        for position in (map_x, map_y):
            fraction = position - np.floor(position)
            position += fraction * fraction * (3 - 2 * fraction) - fraction
        linear = cv2.remap(pixels, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        # Truncate; the excess is larger, as OpenCV's sums of 16 products err by more.
        rotated = cv2.addWeighted(cubic, 4 / 3, linear, -1 / 3, -0.499, dtype=cv2.CV_8U)
        cv2.copyTo(rotated, inside.view(np.uint8), out[block])
    return out


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
    "AutoContrast": lambda image, level, sign: autocontrast(image),
    "Equalize": lambda image, level, sign: equalize(image),
    "Invert": lambda image, level, sign: invert(image),
    "Rotate": _signed(rotate, 30.0),
    "Posterize": lambda image, level, sign: posterize(image, _steps(level, 4)),
    "PosterizeIncreasing": lambda image, level, sign: posterize(image, 4 - _steps(level, 4)),
    "Solarize": lambda image, level, sign: solarize(image, _steps(level, 256)),
    "SolarizeIncreasing": lambda image, level, sign: solarize(image, 256 - _steps(level, 256)),
    "SolarizeAdd": lambda image, level, sign: solarize_add(image, _steps(level, 110)),
    "Color": _upwards(color),
    "ColorIncreasing": _away(color),
    "Contrast": _upwards(contrast),
    "ContrastIncreasing": _away(contrast),
    "Brightness": _upwards(brightness),
    "BrightnessIncreasing": _away(brightness),
    "Sharpness": _upwards(sharpness),
    "SharpnessIncreasing": _away(sharpness),
    "ShearX": _signed(shear_x, 0.3),
    "ShearY": _signed(shear_y, 0.3),
    "TranslateXRel": _signed(translate_x, 0.45, axis=1),
    "TranslateYRel": _signed(translate_y, 0.45, axis=0),
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

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        image = np.ascontiguousarray(image)
        for index in rng.integers(len(self.names), size=self.num_ops):
            if rng.random() < self.prob:
                level, sign = self.level(rng), 1 if rng.random() < 0.5 else -1
                image = OPS[self.names[index]](image, level, sign)
        return image

    def level(self, rng: np.random.Generator) -> float:
        """Draw a level in [0, 10]."""
        level = self.magnitude
        if math.isinf(self.std):
            level = rng.uniform(0.0, self.magnitude)
        elif self.std > 0:
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
            image = (brightness, contrast, color)[index](image, float(factors[index]))
        return image


def three_augment(image: Image, rng: np.random.Generator) -> Image:
    """Apply exactly one of grayscale, solarize at 128 or Gaussian blur, U(0.1, 2) (DeiT III)."""
    image = np.ascontiguousarray(image)
    choice, radius = rng.integers(3), rng.uniform(0.1, 2.0)
    if choice == 0:
        return grayscale(image)
    return solarize(image, 128) if choice == 1 else gaussian_blur(image, radius)


@dataclass(frozen=True)
class Chain:
    """Apply augmentations one after the other; none returns the image itself."""

    steps: tuple[Augment, ...]

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        for step in self.steps:
            image = step(image, rng)
        return image


def parse_rand_augment(spec: str) -> RandAugment:
    """Read timm's grammar: `rand` and, in any order, -m9 -n2 -p0.5 -mstd0.5 -inc1.

    m is the magnitude (default 10), n the operations per image (2), p the probability of each
    (0.5), mstd the deviation of the level (0; above 100 the level is uniform in [0, m]), inc
    whether the blends grow stronger with the level (0). Raises ValueError, naming the token.
    """
    kind, *tokens = spec.split("-")
    if kind != "rand":
        raise ValueError(f"augmentation {spec!r} must start with 'rand'")
    values = {"m": MAX_LEVEL, "n": 2, "p": 0.5, "mstd": 0.0, "inc": 0}
    for token in tokens:
        if token[:1] in ("w", "t"):
            raise ValueError(f"{token!r} in {spec!r}: weighted choices are not supported")
        match = re.fullmatch(r"(m|n|inc)(\d+)|(p|mstd)(\d+(?:\.\d+)?|inf)", token)
        if not match:
            raise ValueError(f"unknown token {token!r} in {spec!r}: use m9 n2 p0.5 mstd0.5 inc1")
        key, number = match[1] or match[3], match[2] or match[4]
        values[key] = type(values[key])(number)
    if values["p"] > 1:
        raise ValueError(f"p in {spec!r} must be a probability, at most 1")
    std = math.inf if values["mstd"] > 100 else values["mstd"]
    names = INCREASING_OPS if values["inc"] else ORIGINAL_OPS
    return RandAugment(names, values["m"], std, values["n"], values["p"])


def make_augment(spec: str, color_jitter: float = 0.0) -> Augment:
    """Return the augmentation `spec` names: "" (none), "rand-..." or "3aug".

    Colour jitter of the given strength follows, except after "rand-...", which replaces it (timm
    and DeiT). Raises ValueError for any other spec or a negative strength.
    """
    if color_jitter < 0:
        raise ValueError(f"color_jitter must not be negative, got {color_jitter}")
    if spec.startswith("rand"):
        return parse_rand_augment(spec)
    if spec not in ("", "3aug", "3-augment", "three"):
        raise ValueError(f"unknown augmentation {spec!r}: use '', 'rand-m9-mstd0.5-inc1' or '3aug'")
    jitter = (ColorJitter(color_jitter),) if color_jitter else ()
    return Chain(((three_augment,) if spec else ()) + jitter)
