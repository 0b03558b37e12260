"""The orientation that a camera notes in EXIF, and images turned by it."""

from PIL import ExifTags, Image, ImageOps


def orientation(image: Image.Image) -> int:
    """Return the number that EXIF (or XMP) gives for an image, 1 where neither does."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def turned(image: Image.Image, number: int) -> Image.Image:
    """Return an image turned or mirrored by EXIF's number; one that means nothing changes nothing.

    For pixels that no longer have their EXIF, as they were read anew.
    """
    image.getexif()[ExifTags.Base.Orientation] = number
    return ImageOps.exif_transpose(image)
