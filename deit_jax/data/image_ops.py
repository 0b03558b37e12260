"""Operations on uint8 RGB images with Pillow's pixels, which the reference uses.

Tables and blends are computed as Pillow computes them, geometric operations use its pixel centres,
its bicubic kernel and its truncation; what is left to differ is in tests/test_pixels.py. Every
function is pure: an image in, a new image out. OpenCV works on many threads unless told otherwise.
Shapes: H W pixels.
"""

import math

import cv2
import numpy as np
from jaxtyping import UInt8

Image = UInt8[np.ndarray, "H W 3"]

FILL = (124, 116, 104)  # ImageNet's mean colour, for what a geometric operation uncovers

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
    return _lookup(image, np.arange(256) + amount * (np.arange(256) < 128))


def autocontrast(image: Image) -> Image:
    """Stretch each channel's range to [0, 255]."""
    low, high = np.array([cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]).T
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
    base, scale = np.float32(constant), np.float32(factor)
    table = base + scale * (np.arange(256, dtype=np.float32) - base)
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
    rows = runs[3 * starts].astype(np.float32)
    step, item = rows.strides
    taken = np.lib.stride_tricks.as_strided(
        rows, (height, 4, 3 * width), (step, 3 * item, item), writeable=False
    )
    total = np.einsum("hk,hkc->hc", taps, taken)
    sheared = cv2.add(total, _TRUNCATE, dtype=cv2.CV_8U)  # type: ignore[call-overload]  # a scalar
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
    # The part of a position that is the column's and the part that is the row's.
    columns = np.array((cos * x + (width / 2 - 0.5), sin * x + (height / 2 - 0.5)), np.float32)
    rows = np.array((-sin * y, cos * y), np.float32)
    pixels, out = image.astype(np.float32), _filled(height, width)
    for block in _blocks(height):
        map_x, map_y = columns[0] + rows[0, block], columns[1] + rows[1, block]
        inside = (map_x >= -0.5) & (map_x < width - 0.5) & (map_y >= -0.5) & (map_y < height - 0.5)
        # The kernel is linear in a, so a = -1 is (4 K(-3/4) - K(0)) / 3, up to a negligible cross
        # term in two dimensions; and K(0) is linear interpolation of a smoothstepped fraction.
        cubic = cv2.remap(pixels, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        for position in (map_x, map_y):
            fraction = position - np.floor(position)
            bend = 3 - 2 * fraction
            bend *= fraction
            bend -= 1
            bend *= fraction
            position += bend
        linear = cv2.remap(pixels, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        # Truncate; the excess is larger, as OpenCV's sums of 16 products err by more.
        rotated = cv2.addWeighted(cubic, 4 / 3, linear, -1 / 3, -0.499, dtype=cv2.CV_8U)
        cv2.copyTo(rotated, inside.view(np.uint8), out[block])
    return out
