"""HTML and SVG elements of a page that needs nothing but itself; all text is escaped."""

import base64
import io
from collections.abc import Sequence
from xml.etree import ElementTree

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Element = ElementTree.Element
LARGE = 96  # pixels; a larger photograph is smaller as JPEG
THUMBNAIL = 192


def element(tag: str, *children, **attributes) -> Element:
    """Return an element; children are elements, text, lists of both, or None.

    `class_` and `stroke_width` are the attributes class and stroke-width; None leaves one out.
    """
    names = {k: k.rstrip("_").replace("_", "-") for k in attributes}
    made = Element(tag, {names[k]: str(v) for k, v in attributes.items() if v is not None})
    _add(made, children)
    return made


def _add(parent: Element, children: Sequence) -> None:
    for child in children:
        if child is None:
            continue
        if isinstance(child, str):
            if len(parent):
                parent[-1].tail = (parent[-1].tail or "") + child
            else:
                parent.text = (parent.text or "") + child
        elif isinstance(child, ElementTree.Element):
            parent.append(child)
        else:
            _add(parent, child)


def document(page: Element) -> str:
    """Return a page as HTML."""
    return "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html")


def inline(part: Element) -> str:
    """Return an element as HTML, for a page that somebody else makes."""
    return ElementTree.tostring(part, encoding="unicode", method="html")


def data_uri(pixels: UInt8[np.ndarray, "H W C"], kind: str = "PNG") -> str:
    """Return an image as the address of itself."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 85} if kind == "JPEG" else {}))
    code = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{code}"


def photograph(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """Return a photograph as the address of itself, no larger than a thumbnail."""
    if max(pixels.shape) <= LARGE:
        return data_uri(pixels)
    small = Image.fromarray(pixels)
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return data_uri(np.asarray(small), "JPEG")


def heat(values: Float[np.ndarray, "H W"], low: float, high: float) -> UInt8[np.ndarray, "H W 3"]:
    """Return values as colours from violet, `low`, to yellow, `high` (viridis)."""
    share = (np.asarray(values, np.float64) - low) / max(high - low, 1e-12)
    grey = np.rint(255 * np.clip(share, 0, 1)).astype(np.uint8)
    return cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[..., ::-1].copy()


def sheet(
    tiles: UInt8[np.ndarray, "n h w 3"], columns: int, gap: int = 1
) -> UInt8[np.ndarray, "H W 4"]:
    """Return tiles row by row on one image, transparent between them."""
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 4)
    page = np.zeros(shape, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        page[top : top + height, left : left + width, :3] = tile
        page[top : top + height, left : left + width, 3] = 255
    return page
