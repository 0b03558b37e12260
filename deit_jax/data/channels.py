"""Images of other channels than red, green and blue, by `data.channels`.

1   grey, Pillow's L of the image
4   red, green, blue and alpha as they are stored, alpha 255 where there is none
n   as many as there are in an array [H W n] (.npy) or a TIFF file; so for 4 and 1 too

Every channel is resized by itself: alpha is one as the others and weights no colour. Arrays are
never unpickled.
"""

import io
import math
import re
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from deit_jax.data import depth
from deit_jax.errors import UserError

_NUMPY = b"\x93NUMPY"
_HEADER = (  # of numbers alone: their type, whether columns come first, their shape
    re.compile(rb"'descr': *'([<>|=]?[biuf]\d{1,2})'"),
    re.compile(rb"'fortran_order': *(True|False)"),
    re.compile(rb"'shape': *\(([\d, ]{0,60})\)"),
)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MOST_PACKED = 1100  # times that Deflate makes bytes smaller: 1032, and some
_STACKS = ("CYX", "QYX", "IYX", "ZYX", "SYX")  # tifffile's axes of channels before rows

Stack = UInt8[np.ndarray, "H W C"]


class MixedChannels(UserError):
    """An image whose channels are not those of the data."""


def is_array(file: bytes) -> bool:
    """Return whether a file is an array as numpy.save writes it."""
    return file[: len(_NUMPY)] == _NUMPY


def array_in(file: bytes) -> np.ndarray:
    """Return the numbers in a .npy file; raise ValueError for what holds objects, or too little."""
    version, width = file[6:7], 2 if file[6:7] == b"\1" else 4  # bytes of the header's length
    if version not in (b"\1", b"\2", b"\3"):
        raise ValueError(f"an array in version {version!r} of NumPy's format")
    start = 8 + width + int.from_bytes(file[8 : 8 + width], "little")
    # Not by NumPy, which has Python parse it: Python 3.11 fails at that in several threads.
    fields = [pattern.search(file[8 + width : start]) for pattern in _HEADER]
    kind, order, sides = (match and match[1].decode() for match in fields)
    if kind is None or order is None or sides is None:
        raise ValueError("an array whose header tells of no plain numbers")
    dtype, shape = np.dtype(kind), tuple(int(side) for side in sides.split(",") if side.strip())
    if (count := math.prod(shape)) * dtype.itemsize != len(file) - start:
        raise ValueError(f"an array of {count} numbers in {max(0, len(file) - start)} bytes")
    values = np.frombuffer(file, dtype, count, start)
    return values.reshape(shape, order="F" if order == "True" else "C")


def is_tiff(file: bytes) -> bool:
    """Return whether a file begins as a TIFF does."""
    return file[:4] in _TIFF


def is_stack(file: bytes, channels: int) -> bool:
    """Return whether a file is a TIFF of more channels than Pillow would keep."""
    if not is_tiff(file) or channels in (1, 3):
        return False
    if channels != 4:
        return True
    try:
        with Image.open(io.BytesIO(file)) as image:
            frames = getattr(image, "n_frames", 1)  # each a channel
            return image.mode == "RGBX" or (frames == channels and len(image.getbands()) == 1)
    except UnidentifiedImageError:
        return True


def tiff_in(file: bytes, channels: int) -> np.ndarray:
    """Return the first picture in a TIFF file, [H W C]; raise ValueError where it has no such."""
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise UserError(
            f"a TIFF of {channels} channels or of unusual pixels; it takes pip install "
            "'deit_jax[tiff]', or save it as 8 or 16-bit integers"
        ) from error
    with tifffile.TiffFile(io.BytesIO(file)) as tiff:
        picture: Any = tiff.series[0]
        axes, shape = picture.axes, picture.shape
        if len(shape) > 2 and axes not in ("YXS", *_STACKS):  # several pictures: the first
            picture = tiff.pages[0]
            axes, shape = picture.axes, picture.shape
        sizes = dict(zip(axes, shape, strict=True))
        check_size(sizes.get("Y", 0), sizes.get("X", 0))
        if (turn := _tag(tiff.pages[0], "Orientation")) not in (0, 1):
            raise ValueError(f"it notes orientation {turn}; save it upright")
        if picture.nbytes > _MOST_PACKED * len(file):
            raise ValueError(f"{picture.nbytes} bytes of pixels in a file of {len(file)}")
        if math.prod(shape) > math.prod((sizes["Y"], sizes["X"], channels)):
            raise misfit(math.prod(shape) // (sizes["Y"] * sizes["X"]), channels)
        values = picture.asarray(maxworkers=1)
    return np.moveaxis(values, 0, -1) if axes in _STACKS else values


def _tag(page, name: str) -> int:
    tag = page.tags.get(name)
    return 0 if tag is None else int(tag.value)


def check_size(height: int, width: int) -> None:
    """Raise ValueError for an image without pixels, or of more than Pillow would open."""
    if height < 1 or width < 1:
        raise ValueError(f"{width} x {height} pixels")
    if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{width} x {height} pixels, more than {Image.MAX_IMAGE_PIXELS}")


def of_array(array: np.ndarray, bits: int, channels: int) -> Stack:
    """Return an array [H W] or [H W C] as bytes of the channels that the data has."""
    if array.ndim not in (2, 3):
        raise ValueError(f"an array of shape {array.shape}, not [H W] or [H W C]")
    array = array[:, :, None] if array.ndim == 2 else array
    check_size(*array.shape[:2])
    if array.shape[0] == channels != array.shape[2] and channels not in (1, 3, 4):
        raise ValueError(f"an array of shape {array.shape}; save it as [H W C], not [C H W]")
    if array.dtype == bool:
        array = 255 * array.astype(np.uint8)
    elif array.dtype != np.uint8:
        array = depth.as_bytes(array, bits)
    return fitted(np.ascontiguousarray(array), channels)


def fitted(pixels: UInt8[np.ndarray, "H W c"], channels: int) -> Stack:
    """Return an image with the data's channels; raise MixedChannels where there is no such."""
    have = pixels.shape[2]
    if have == channels:
        return pixels
    if channels == 1 and have in (3, 4):
        grey = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3])).convert("L")
        return np.asarray(grey)[:, :, None]
    if channels == 4 and have in (1, 3):
        colours = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        return np.concatenate([colours, np.full_like(colours[:, :, :1], 255)], axis=2)
    raise misfit(have, channels)


def misfit(have: int, channels: int) -> MixedChannels:
    """Return the error of an image with another number of channels."""
    return MixedChannels(
        f"mixed channels: {have} in this image, config.data.channels={channels}; change the "
        "latter, or leave this image out"
    )


def as_colours(pixels: UInt8[np.ndarray, "*B H W C"]) -> UInt8[np.ndarray, "*B H W 3"]:
    """Return images for people: the first three channels as red, green and blue, or else grey."""
    if pixels.shape[-1] < 3:
        return np.repeat(pixels[..., :1], 3, axis=-1)
    return pixels[..., :3]
