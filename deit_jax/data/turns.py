"""The orientation that a camera notes in EXIF, and images turned by it."""

from PIL import ExifTags, Image

# What brings a picture upright, by EXIF's number; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """Return the number that EXIF (or XMP) gives for an image, 1 where neither does."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def turned(image: Image.Image, number: int) -> Image.Image:
    """Return an image turned or mirrored by EXIF's number; one that means nothing changes nothing.

    The same as Pillow's ImageOps.exif_transpose, for pixels that no longer have their EXIF.
    """
    return image.transpose(_TURNS[number]) if number in _TURNS else image
