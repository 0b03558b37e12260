"""Pixels of more than 8 bits as bytes: scaled by what they hold, not by what they could hold.

Sensors and scanners of 10, 12 or 14 bits write 16-bit files. As if they used all 16, such images
would be nearly black. So integers lose their lowest bits until eight of those they hold are left
(the floor of v / 2 ** (bits - 8), as scikit-image's img_as_ubyte and Pillow have it for 16 bits).
How many they hold is

1. `data.bits`, where it is not 0;
2. else what the file says: TIFF's samples of 12 bits and its tag MaxSampleValue, PNG's chunk sBIT,
   the maximum of a PGM file, JPEG 2000;
3. else the least even number from 8 on that holds the image's largest value: 16 from 2 ** 14 on.

By the third rule an image of 1023 at most appears four times as bright as one that reaches 1024: a
data set whose dim images shall stay dim wants `data.bits`. Floats are brightness in [0, 1], as in
scikit-image, or else in [0, 255]; an image of at most 1 is taken for the former. What is negative,
larger or not finite has no such reading and is refused.
"""

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile

MOST_BITS = 32
_COLOURS = ("RGB", "RGBA")
_MAX_SAMPLE_VALUE, _BITS_PER_SAMPLE, _SAMPLE_FORMAT, _PLANAR = 281, 258, 339, 284  # TIFF's


class DepthError(ValueError):
    """Pixels that no rule turns into bytes; says why, and what to do."""


def as_bytes(values: np.ndarray, bits: int = 0, stated: int = 0) -> UInt8[np.ndarray, "..."]:
    """Return integers or floats of any shape as bytes; raise DepthError where that has no meaning.

    `bits` are those to go by, 0 for those that the values hold, which are `stated` at least.
    """
    if values.dtype.kind == "f":
        return _floats_as_bytes(values)
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise DepthError(
            f"pixels from {low} to {high}, and below 0 there is no brightness; shift and scale "
            "them to 0 … 65535 and save the image again"
        )
    if high.bit_length() > (bits or MOST_BITS):
        wanted = f"config.data.bits={bits}" if bits else f"{MOST_BITS} bits"
        raise DepthError(f"pixels up to {high}, more than {wanted} can hold; scale them down")
    return _shifted(values, bits or max(stated, _even_bits(high)))


def _even_bits(high: int) -> int:
    return max(8, high.bit_length() + high.bit_length() % 2)


def _shifted(values: np.ndarray, bits: int) -> UInt8[np.ndarray, "..."]:
    return (values >> (bits - 8)).astype(np.uint8)


def _floats_as_bytes(values: np.ndarray) -> UInt8[np.ndarray, "..."]:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(values).all():
        raise DepthError("pixels that are not finite numbers; replace them and save it again")
    if low < 0 or high > 255:
        raise DepthError(
            f"pixels from {low:g} to {high:g}, neither within [0, 1] nor within [0, 255]; scale "
            "them to one of these and save the image again"
        )
    wide = values.astype(np.float64)
    return np.rint(255 * wide if high <= 1 else wide).astype(np.uint8)


def shallow(image: Image.Image, file: bytes, bits: int = 0) -> Image.Image:
    """Return an image just opened from a file's bytes, with 8 bits a colour.

    Raise DepthError where the pixels have no such reading. Most images have 8 bits: they are
    returned as they are.
    """
    if not is_deep(image):
        return image
    return (_shallow_colour if image.mode in _COLOURS else _shallow_grey)(image, file, bits)


def is_deep(image: Image.Image) -> bool:
    """Return whether an image that was opened and not yet loaded has more than 8 bits a colour."""
    if image.mode in _COLOURS:
        if image.format == "TIFF":
            return _tag(image, _BITS_PER_SAMPLE) == 16
        return image.format == "PNG" and ";16" in _codec(image)[2]
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _shallow_grey(image: Image.Image, file: bytes, bits: int) -> Image.Image:
    scaled = _scaled_by_pillow(image)
    values = np.asarray(image)
    if image.mode == "I" and image.format == "TIFF" and _tag(image, _SAMPLE_FORMAT) in (0, 1):
        values = values.view(np.uint32)  # which Pillow keeps in signed numbers
    return Image.fromarray(
        as_bytes(values, 16 if scaled else bits, _stated_bits(image, values, file))
    )


def _scaled_by_pillow(image: Image.Image) -> bool:
    """Return whether Pillow scales the samples to fill 16 bits, by what the format says."""
    maximum = _codec(image)[1] if _codec(image)[0] in ("ppm", "ppm_plain") else 65535
    return image.format == "JPEG2000" or maximum != 65535


def _codec(image: Image.Image) -> tuple:
    """Return (codec, second argument, raw mode) of an image that is not yet loaded."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return "", None, ""
    name, arguments = image.tile[0][0], image.tile[0][3]
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    second = arguments[1] if len(arguments) > 1 else None
    return name, second, str(arguments[0]) if arguments else ""


def _shallow_colour(image: Image.Image, file: bytes, bits: int) -> Image.Image:
    """Read 16-bit colours again where Pillow's upper eight bits are not those that are held."""
    raw = _codec(image)[2]
    if _tag(image, _PLANAR) == 2 and ";16" not in raw:
        raise DepthError("16-bit colours in separate planes; save them pixel by pixel")
    upper = np.asarray(image)[:, :, :3]
    if bits == 16 or (bits == 0 and upper.max() >= 1 << (14 - 8)):
        return image
    found = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16:
        raise DepthError("16-bit colours that OpenCV cannot read; save them as 16-bit RGB in PNG")
    values: np.ndarray = found[..., 2::-1]  # blue, green, red, perhaps alpha
    # Planes, colours times alpha, an orientation: the upper bits tell whether both read the same.
    if not np.array_equal(values >> 8, upper):
        raise DepthError("16-bit colours of an unusual kind; save them as plain 16-bit RGB in PNG")
    return Image.fromarray(as_bytes(values, bits, _stated_bits(image, values, file)))


def _stated_bits(image: Image.Image, values: np.ndarray, file: bytes) -> int:
    """Return how many bits a file says that its samples hold, 0 where it does not."""
    if image.format == "PNG":
        bits = _significant_bits(file)
        if not 8 <= bits < 16:
            return 16 if bits == 16 else 0
        # The format asks that samples are scaled to fill 16 bits. Not all who write sBIT do so.
        bare = int(values.max()) >> bits == 0 and bool((values & ((1 << (16 - bits)) - 1)).any())
        return bits if bare else 16
    if image.format == "TIFF":
        twelve = 12 if _tag(image, _BITS_PER_SAMPLE) == 12 else 0
        highest = _tag(image, _MAX_SAMPLE_VALUE)
        return max(twelve, _even_bits(highest)) if 0 < highest < 1 << MOST_BITS else twelve
    return 0


def _tag(image: Image.Image, number: int) -> int:
    """Return the largest value of a TIFF's tag, 0 where there is none."""
    found = getattr(image, "tag_v2", {}).get(number, 0)
    values = found if isinstance(found, tuple) else (found,)
    return max((value for value in values if isinstance(value, int)), default=0)


def _significant_bits(file: bytes) -> int:
    """Return the bits that a PNG's chunk sBIT notes of its colours, 0 without one."""
    colours = 1 if file[25] in (0, 4) else 3  # of what the header says it holds, without alpha
    at = 8
    while at + 8 <= len(file) and (kind := file[at + 4 : at + 8]) != b"IDAT":
        length = int.from_bytes(file[at : at + 4])
        if kind == b"sBIT":
            return max(file[at + 8 : at + 8 + min(length, colours)], default=0)
        at += 12 + length
    return 0
