"""The kinds of image files that the installed libraries read."""

import contextlib
import functools
import importlib

from PIL import Image

# Pillow's names of formats of still pictures. It knows others, which are programs (EPS, WMF) or
# only recognised (MPEG, HDF5).
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "JXL", "PCX"),
    *("PNG", "PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)


@functools.cache
def register() -> None:
    """Let Pillow know of the readers that other packages bring: HEIC and JPEG XL."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_jxl")


@functools.cache
def image_suffixes(channels: int = 3) -> tuple[str, ...]:
    """Return the endings of files that can be read here: .jpg, .png, .heic where a reader is, …

    Of other channels than three also arrays.
    """
    register()
    arrays = {".npy"} if channels != 3 else set()
    readable = {name for name in FORMATS if name in Image.OPEN}
    found = {end for end, name in Image.registered_extensions().items() if name in readable}
    return tuple(sorted(found | {".jpg", ".jpeg", ".png"} | arrays))
