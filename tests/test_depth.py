"""Images of more than 8 bits against formulas in numpy, on real files of photographs."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from skimage import data, util

from deit_jax.data import decode, decoders
from deit_jax.data.decode import Reading
from deit_jax.errors import UserError


@pytest.fixture(scope="module")
def grey():
    """A photograph in [0, 1], which reaches both ends."""
    photo = data.camera()[::3, ::3] / 255
    return (photo - photo.min()) / np.ptp(photo)


@pytest.fixture(scope="module")
def colour():
    photo = data.chelsea()[::3, ::3] / 255
    return (photo - photo.min()) / np.ptp(photo)


def deep(photo, bits):
    """Return a photograph that uses all of some bits, in the smallest type of numpy's."""
    values = np.rint(photo * (2**bits - 1))
    return values.astype(np.uint16 if bits <= 16 else np.uint32)


def tiff(values, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def png(values):
    return cv2.imencode(".png", values[..., ::-1] if values.ndim == 3 else values)[1].tobytes()


def with_chunk(file, kind, content):
    """Return a PNG with a chunk after its header."""
    body = kind + content
    chunk = struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    return file[:33] + chunk + file[33:]


def read(image, bits=0):
    """Return the pixels, which training and evaluation must have alike."""
    reading = Reading(bits=bits)
    pixels = np.asarray(decode.decode(image, "x", reading))
    for name in decoders.available():
        again = decode.read(image, "x", decoders.choose(name), None, reading)
        assert np.array_equal(again, pixels)
    return pixels


def in_three(values):
    return values if values.ndim == 3 else np.stack(3 * [values], axis=2)


WRITERS = {
    "png": png,
    "tiff": tiff,
    "big-endian tiff": lambda v: tiff(v, byteorder=">"),
    "deflated tiff": lambda v: cv2.imencode(".tiff", v[..., ::-1] if v.ndim == 3 else v)[
        1
    ].tobytes(),
    "array": lambda v: v,
    "array of int64": lambda v: v.astype(np.int64),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("shape", ["grey", "colour"])
def test_an_image_is_scaled_by_the_bits_that_it_holds(request, kind, bits, shape):
    values = deep(request.getfixturevalue(shape), bits)
    assert np.array_equal(read(WRITERS[kind](values)), in_three(values // 2 ** (bits - 8)))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("highest", "bits"), [(1023, 10), (1024, 12), (16383, 14), (16384, 16)])
def test_the_largest_value_says_how_many_bits_are_held(kind, highest, bits):
    """A grey wedge; the step from one number of bits to the next is where brightness jumps."""
    for values in (np.arange(highest + 1, dtype=np.uint16)[None].repeat(2, 0),):
        assert np.array_equal(read(WRITERS[kind](values)), in_three(values // 2 ** (bits - 8)))
        three = in_three(values)
        assert np.array_equal(read(WRITERS[kind](three)), three // 2 ** (bits - 8))


def test_16_bits_are_those_of_scikit_image_and_of_pillow(grey, colour):
    for values in (deep(grey, 16), deep(colour, 16)):
        assert np.array_equal(read(png(values)), in_three(util.img_as_ubyte(values)))
    assert np.array_equal(
        read(png(deep(colour, 16))), Image.open(io.BytesIO(png(deep(colour, 16))))
    )


@pytest.mark.parametrize("kind", ["png", "tiff", "array"])
def test_bits_of_the_data_set_keep_dim_images_dim(grey, colour, kind):
    for photo in (grey, colour):
        dim = deep(photo, 9)
        assert np.array_equal(read(WRITERS[kind](dim), 12), in_three(dim // 16))
        assert np.array_equal(read(WRITERS[kind](dim), 16), in_three(dim // 256))
        with pytest.raises(
            UserError, match=r"^x: pixels up to 4095, more than config\.data\.bits="
        ):
            read(WRITERS[kind](deep(photo, 12)), 10)


def test_bits_of_the_data_set_leave_8_bit_images_alone(colour):
    values = np.rint(255 * colour).astype(np.uint8)
    assert np.array_equal(read(png(values), 12), values)
    assert np.array_equal(read(values, 12), values)


def test_colours_beside_opaque_alpha_are_scaled_by_themselves(colour):
    values = deep(colour, 12)
    alpha = np.full((*values.shape[:2], 1), 65535, np.uint16)
    four = np.concatenate([values[..., ::-1], alpha], axis=2)
    assert np.array_equal(read(cv2.imencode(".png", four)[1].tobytes()), values // 16)
    stored = np.concatenate([values, alpha], axis=2)
    file = tiff(stored, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(read(file), values // 16)


def test_tiff_says_how_many_bits_it_means(grey, colour):
    for photo, options in ((grey, {}), (colour, {"photometric": "rgb"})):
        dim = deep(photo, 9)
        count = 1 if dim.ndim == 2 else 3
        for highest, bits in ((4095, 12), (65535, 16), (100, 10)):
            tag = (281, "H", count, (highest,) * count if count > 1 else highest, True)
            file = tiff(dim, extratags=[tag], **options)
            assert np.array_equal(read(file), in_three(dim // 2 ** (bits - 8))), highest


def test_samples_of_12_bits_in_tiff(grey):
    """Packed as two in three bytes; written by hand, as Pillow and OpenCV only read them."""
    values = (deep(grey, 12) // 8)[:, :170]  # dim: that there are 12 bits is in the file alone
    pairs = values.reshape(-1, 2).astype(np.uint32)
    both = pairs[:, 0] << 12 | pairs[:, 1]
    packed = np.stack([both >> 16, both >> 8 & 255, both & 255], axis=1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(packed))]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    file = struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + directory + bytes(4)
    assert np.array_equal(read(file), in_three(values // 16))


def test_png_says_how_many_bits_it_means(grey, colour):
    """Samples that fill 16 bits, as the format asks; or those that do not and sBIT all the same."""
    for photo in (grey, colour):
        chunk = bytes([12] * (1 if photo.ndim == 2 else 3))
        dim = deep(photo, 8)  # of 12 bits
        file = with_chunk(png(dim * 16), b"sBIT", chunk)
        assert np.array_equal(read(file), in_three(dim // 16))
        assert np.array_equal(read(with_chunk(png(dim), b"sBIT", chunk)), in_three(dim // 16))
        whole = deep(photo, 12)
        filled = whole << 4 | whole >> 8
        assert np.array_equal(read(with_chunk(png(filled), b"sBIT", chunk)), in_three(whole // 16))


@pytest.mark.parametrize("highest", [1023, 4095])
@pytest.mark.parametrize("bits", [0, 12])
def test_pgm_says_how_large_its_values_can_be(grey, highest, bits):
    values = np.rint(grey * highest / 8).astype(np.uint16)  # dim, and meant so
    header = f"P5 {values.shape[1]} {values.shape[0]} {highest}\n".encode()
    ours = read(header + values.astype(">u2").tobytes(), bits).astype(int)
    expected = np.floor(values * (65535 / highest) / 256)
    assert np.abs(ours - in_three(expected)).max() <= 1


def test_integers_of_up_to_32_bits(grey):
    for bits in (20, 24, 31, 32):
        values = deep(grey, bits)
        even = bits + bits % 2
        for image in (tiff(values), values, values.astype(np.int64)):
            assert np.array_equal(read(image), in_three(values >> (even - 8))), bits
        if bits < 32:
            assert np.array_equal(
                read(tiff(values.astype(np.int32))), in_three(values >> (even - 8))
            )
    with pytest.raises(UserError, match=r"pixels up to \d+, more than 32 bits can hold"):
        read(deep(grey, 32).astype(np.int64) * 2)


def test_signed_integers_are_read_as_unsigned_ones_unless_negative(grey):
    values = deep(grey, 12).astype(np.int16)
    for image in (tiff(values), values, tiff(values.astype(np.int32))):
        assert np.array_equal(read(image), in_three(values // 16))
    for image in (tiff(values - 5), values - 5):
        with pytest.raises(UserError, match=r"^x: pixels from -5 to 4090, .*save the image again$"):
            read(image)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_floats_are_brightness_up_to_1_or_up_to_255(grey, colour, kind):
    values = grey.astype(kind)
    expected = in_three(util.img_as_ubyte(values.astype(np.float64)))
    for image in (values, tiff(values)):  # which Pillow reads in float32 alone, and grey
        assert np.array_equal(read(image), expected)
    large = np.rint(255 * grey).astype(kind)
    for image in (large, tiff(large)):
        assert np.array_equal(read(image), in_three(large.astype(np.uint8)))
    wide = colour.astype(kind).astype(np.float64)
    for image in (colour.astype(kind), tiff(colour.astype(kind), photometric="rgb")):
        assert np.array_equal(read(image), util.img_as_ubyte(wide))


@pytest.mark.parametrize("kind", ["tiff", "array"])
def test_floats_without_a_meaning_are_refused_by_name_and_range(grey, kind):
    for factor, shift, said in (
        (4095, 0, r"pixels from 0 to 4095, neither within \[0, 1\] nor within \[0, 255\]"),
        (2, -1, r"pixels from -1 to 1, neither"),
        (np.nan, 0, "not finite"),
        (1, np.inf, "not finite"),
    ):
        with pytest.raises(UserError, match=rf"^x: .*{said}") as error:
            read(WRITERS[kind]((grey * factor + shift).astype(np.float32)))
        assert "\n" not in str(error.value)


def test_what_pillow_would_read_wrongly_is_refused(colour):
    """Pillow takes 16-bit samples in planes for bytes, if they are not compressed."""
    planes = deep(colour, 16).transpose(2, 0, 1).copy()
    with pytest.raises(UserError, match="separate planes"):
        read(tiff(planes, photometric="rgb", planarconfig="separate"))


def test_the_first_page_is_read(grey):
    pages = np.stack([deep(grey, 12), deep(1 - grey, 16)])
    assert np.array_equal(read(tiff(pages, photometric="minisblack")), in_three(pages[0] // 16))
    three = np.stack([in_three(page) for page in pages])
    assert np.array_equal(read(tiff(three, photometric="rgb")), three[0] // 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_turned_as_pillow_turns_it(grey, colour, orientation):
    for values, options in ((deep(grey, 12), {}), (deep(colour, 12), {"photometric": "rgb"})):
        file = tiff(values, extratags=[(274, "H", 1, orientation, True)], **options)
        eight = tiff(
            (values // 16).astype(np.uint8),
            extratags=[(274, "H", 1, orientation, True)],
            **options,
        )
        expected = Image.open(io.BytesIO(eight)).convert("RGB")
        assert np.array_equal(read(file), expected)
        upright = decode.decode(file, "x", Reading(exif=True))
        assert np.array_equal(upright, ImageOps.exif_transpose(expected))


def test_a_black_image_and_a_flat_one():
    for dtype in (np.uint16, np.int32, np.float32):
        assert not read(np.zeros((3, 4), dtype)).any()
    assert np.array_equal(read(np.full((3, 4), 200, np.uint16)), np.full((3, 4, 3), 200))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_damaged_deep_file_is_named(grey, colour, share):
    for file in (png(deep(colour, 12)), tiff(deep(grey, 12)), tiff(deep(colour, 12))):
        with pytest.raises(UserError, match=r"^x: not a readable image"):
            read(file[: int(share * len(file))])
