"""What is shown of an image: turned as Pillow turns it, squashed and padded as timm does."""

import contextlib
import io
import math
import time

import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data
from sklearn.datasets import load_sample_image

from deit_jax.configs import base
from deit_jax.data import decode, decoders
from deit_jax.data.decode import Reading
from deit_jax.data.decoders import resize_pillow
from deit_jax.data.view import EvalView, padded_part, random_view, reading_of
from deit_jax.errors import UserError

DECODERS = decoders.available()
MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)
SHAPES = [(640, 427), (427, 640), (400, 400), (91, 500), (500, 33), (20, 30), (640, 5)]


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_image("flower.jpg"))  # 640 x 427


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def augment(crop="random_resized"):
    c = base.get_config().augment
    c.crop = crop
    return c


def reading(resize):
    return Reading(resize=resize, fill=FILL)


def test_reading_is_what_the_config_says():
    c = base.get_config().data
    assert reading_of(c) == Reading("crop", False, 0, FILL)
    c.resize, c.exif, c.bits, c.mean = "pad", True, 12, (0.0, 0.5, 1.0)
    assert reading_of(c) == Reading("pad", True, 12, (0, 128, 255))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["jpeg", "grey jpeg", "cmyk jpeg", "png", "webp"])
def test_images_are_turned_as_pillow_turns_them(photo, orientation, kind):
    image = photo.resize((64, 40)).convert({"g": "L", "c": "CMYK"}.get(kind[0], "RGB"))
    options = {"lossless": True} if kind == "webp" else {}
    file = encode(image, kind.split()[-1], exif=exif_of(orientation), **options)
    stored = Image.open(io.BytesIO(file))
    upright = ImageOps.exif_transpose(stored).convert("RGB")
    assert (upright.size == (40, 64)) == (5 <= orientation <= 8)
    for name in DECODERS:
        decoder = decoders.choose(name)
        scratch = np.empty(2**20, np.uint8)
        ours = decode.read(file, "x", decoder, scratch, Reading(exif=True))
        assert np.array_equal(ours, upright)
        assert np.array_equal(decode.read(file, "x", decoder, scratch), stored.convert("RGB"))
    assert np.array_equal(decode.decode(file, "x", Reading(exif=True)), upright)
    shown = EvalView(32, 0.875, Reading(exif=True))(file, "x")
    assert np.array_equal(shown, decode.centre_crop(upright, 32, 0.875))


@pytest.mark.parametrize("name", DECODERS)
def test_a_damaged_exif_leaves_a_readable_or_a_named_image(photo, name):
    file = encode(photo.resize((64, 40)), "jpeg", exif=exif_of(6))
    at = file.index(b"Exif\0\0")
    sizes = set()
    for offset in range(6, 32):
        broken = bytearray(file)
        broken[at + offset] ^= 0xFF
        with contextlib.suppress(UserError):  # which names it: tests/test_decode.py
            pixels = decode.read(
                bytes(broken), "x", decoders.choose(name), None, Reading(exif=True)
            )
            sizes.add(pixels.shape)
    assert sizes <= {(64, 40, 3), (40, 64, 3)}
    assert sizes


@pytest.fixture
def reference(timm):
    """Return a function: the uint8 view that timm's evaluation makes of an image."""
    from timm.data.transforms_factory import transforms_imagenet_eval

    def view(image, size, mode):
        transform = transforms_imagenet_eval(
            size, crop_pct=1.0, crop_mode=mode, interpolation="bicubic", mean=MEAN, normalize=False
        )
        return np.asarray(transform(image)).transpose(1, 2, 0)

    return view


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("resize", "mode"), [("squash", "squash"), ("pad", "border")])
@pytest.mark.parametrize("size", [224, 33])
def test_evaluation_is_timms(photo, reference, shape, resize, mode, size):
    image = photo.resize(shape)
    if resize == "pad" and min(shape) * size < max(shape) / 2:
        pytest.skip("timm rounds the shorter side to none")
    ours = np.asarray(EvalView(size, 0.875, reading(resize)).crop(image))
    assert ours.shape == (size, size, 3)
    expected = reference(image, size, mode)
    if expected.dtype != np.uint8:
        expected = np.rint(255 * expected)
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_of_the_whole_shows_what_a_crop_leaves_out(shape):
    """A black image with one white end."""
    array = np.zeros((*shape[::-1], 3), np.uint8)
    end = max(1, shape[0] // 10)
    array[:, :end] = 255
    for resize in ("squash", "pad"):
        seen = np.asarray(EvalView(64, 0.875, reading(resize)).crop(Image.fromarray(array)))
        assert (seen > 250).all(axis=2).any(), resize
        assert (seen < 5).all(axis=2).any(), resize


@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_of_the_padded_square_is_cut_from_it(photo, shape):
    image = photo.resize(shape)
    side, (width, height) = max(shape), shape
    square = ImageOps.pad(image, (side, side), color=FILL) if width == height else None
    square = square or Image.new("RGB", (side, side), FILL)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    rng = np.random.default_rng(0)
    boxes = [(0, 0, side, side), (0, 0, 1, 1), (side - 1, side - 1, 1, 1)]
    boxes += [decode.random_box(side, side, rng, (0.01, 1.0), (0.5, 2.0)) for _ in range(50)]
    for left, top, w, h in boxes:
        ours = padded_part(np.asarray(image), (left, top, w, h), FILL)
        assert np.array_equal(ours, square.crop((left, top, left + w, top + h)))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("crop", ["random_resized", "simple"])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_training_crops_the_padded_image_as_any_other(photo, name, crop, shape):
    image, resize = photo.resize(shape), decoders.choose(name).resize
    side = max(shape)
    square = Image.new("RGB", (side, side), FILL)
    square.paste(image, ((side - shape[0]) // 2, (side - shape[1]) // 2))
    for seed in range(5):
        ours, expected = (
            random_view(
                np.asarray(seen), 48, augment(crop), np.random.default_rng(seed), resize, how
            )
            for seen, how in ((image, reading("pad")), (square, Reading()))
        )
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_training_with_squash(photo, shape):
    """Random boxes are those of crop; simple crops are of the squashed image."""
    image, size = np.asarray(photo.resize(shape)), 48
    for seed in range(5):
        ours, as_ever = (
            random_view(image, size, augment(), np.random.default_rng(seed), resize_pillow, how)
            for how in (reading("squash"), Reading())
        )
        assert np.array_equal(ours, as_ever)
        squashed = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        ours, expected = (
            random_view(
                np.asarray(seen),
                size,
                augment("simple"),
                np.random.default_rng(seed),
                resize_pillow,
                how,
            )
            for seen, how in ((image, reading("squash")), (squashed, Reading()))
        )
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1), (600, 60000), (12000, 7000)])
@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_extreme_images_take_neither_time_nor_memory(shape, resize):
    resource = pytest.importorskip("resource")
    image = np.full((*shape, 3), (9, 99, 199), np.uint8)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for crop in ("random_resized", "simple"):
        for name in DECODERS:
            view = random_view(
                image,
                224,
                augment(crop),
                np.random.default_rng(0),
                decoders.choose(name).resize,
                reading(resize),
            )
            assert view.shape == (224, 224, 3)
    seen = np.asarray(EvalView(224, 0.875, reading(resize)).crop(Image.fromarray(image)))
    assert np.abs(seen[112, 112].astype(int) - (9, 99, 199)).max() <= (
        255 if resize == "pad" and min(shape) == 1 else 0
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 900_000  # KB; a square of 60,000 would take 10 GB
    assert time.perf_counter() - began < 30


def test_crop_is_as_it_was(photo):
    """The numbers drawn and the pixels made before there was choice."""
    image, c = np.asarray(photo), augment()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        box = decode.random_box(640, 427, rng, c.crop_scale, c.crop_ratio)
        left, top, w, h = box
        expected = photo.crop((left, top, left + w, top + h)).resize(
            (48, 48), Image.Resampling.BICUBIC
        )
        again = np.random.default_rng(seed)
        assert np.array_equal(random_view(image, 48, c, again, resize_pillow), expected)
        assert rng.random() == again.random()
    plain = EvalView(224, 0.875)(encode(photo, "png"), "x")
    assert np.array_equal(plain, decode.centre_crop(photo, 224, 0.875))


def test_a_grey_photograph_is_padded_with_the_mean_colour():
    image = Image.fromarray(data.camera()).resize((100, 50)).convert("RGB")
    seen = np.asarray(EvalView(100, 1.0, reading("pad")).crop(image))
    assert (seen[:25] == FILL).all()
    assert (seen[75:] == FILL).all()
    assert np.array_equal(seen[25:75], image)
    assert math.isclose(FILL[0] / 255, MEAN[0], abs_tol=0.5 / 255)
