"""Images of other channels than three: read as Pillow, numpy and tifffile have them, one by one."""

import builtins
import io
import logging
import pickle
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageEnhance, ImageOps
from skimage import data
from sklearn.datasets import load_sample_image
from torch.nn import functional

from deit_jax import __main__ as program
from deit_jax.configs import base
from deit_jax.data import augment, card, decode, decoders, image_ops
from deit_jax.data.batches import EvalBatches, TrainBatches
from deit_jax.data.channels import MixedChannels, array_in, as_colours
from deit_jax.data.decode import Reading
from deit_jax.data.order import EpochOrder
from deit_jax.data.sources.registry import open_dataset
from deit_jax.data.view import EvalView, random_view, reading_of
from deit_jax.errors import UserError

GREY, ALPHA = Reading(channels=1, fill=(0,)), Reading(channels=4, fill=(0,) * 4)


def of(channels, **fields):
    return Reading(channels=channels, fill=(0,) * channels, **fields)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def tiff(array, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def numbers(*shape, most=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, most, shape).astype(dtype)


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_image("flower.jpg")).resize((90, 60))


@pytest.mark.parametrize("kind", ["jpeg", "png", "cmyk jpeg", "palette png", "webp", "grey jpeg"])
@pytest.mark.parametrize("decoder", decoders.available())
def test_grey_is_pillows(photo, kind, decoder):
    mode = {"c": "CMYK", "g": "L"}.get(kind[0], "RGB")
    image = photo.quantize(64) if kind[:2] == "pa" else photo.convert(mode)
    file = encoded(image, kind.split()[-1])
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB").convert("L"))
    pixels = decode.read(file, "x", decoders.choose(decoder), None, GREY)
    assert np.array_equal(pixels[:, :, 0], expected)
    assert pixels.shape == (60, 90, 1)


def test_grey_arrays_and_deep_files_are_grey(photo):
    grey = np.asarray(photo.convert("L"))
    for array in (grey, grey[:, :, None], np.asarray(photo)):
        assert np.array_equal(decode.pixels_of(array, "x", GREY)[:, :, 0], grey)
        assert np.array_equal(decode.pixels_of(npy(array), "x", GREY)[:, :, 0], grey)
    deep = grey.astype(np.uint16) << 4
    file = cv2.imencode(".png", deep)[1].tobytes()
    for image in (file, deep, npy(deep), tiff(deep)):
        ours = decode.pixels_of(image, "x", of(1, bits=12))
        assert np.array_equal(ours[:, :, 0], grey)


def test_alpha_is_as_it_is_stored_and_full_where_there_is_none(photo):
    alpha = Image.fromarray(numbers(60, 90))
    image = photo.copy()
    image.putalpha(alpha)
    expected = np.asarray(image)
    for kind, options in (("png", {}), ("tiff", {}), ("webp", {"lossless": True, "exact": True})):
        assert np.array_equal(
            decode.pixels_of(encoded(image, kind, **options), "x", ALPHA), expected
        )
    for stored in (np.asarray(photo), encoded(photo, "png"), encoded(photo, "tiff")):
        full = decode.pixels_of(stored, "x", ALPHA)
        assert np.array_equal(full[:, :, :3], photo)
        assert (full[:, :, 3] == 255).all()
    turned = encoded(image, "png", exif=_turned(6))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    assert np.array_equal(decode.pixels_of(turned, "x", of(4, exif=True)), upright)


def _turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_deep_colours_keep_their_alpha(bits):
    values = numbers(20, 30, 4, most=1 << bits, dtype=np.uint16)
    values[..., 3] = numbers(20, 30, most=1 << 16, dtype=np.uint16)
    values[0, 0, 0] = (1 << bits) - 1
    bgra = np.ascontiguousarray(values[:, :, [2, 1, 0, 3]])
    pixels = decode.pixels_of(cv2.imencode(".png", bgra)[1].tobytes(), "x", ALPHA)
    assert np.array_equal(pixels[:, :, :3], values[:, :, :3] >> (bits - 8))
    assert np.array_equal(pixels[:, :, 3], values[:, :, 3] >> 8)


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_arrays_and_tiffs_are_as_numpy_and_tifffile_have_them(channels):
    values = numbers(24, 30, channels)
    planes = np.ascontiguousarray(np.moveaxis(values, -1, 0))
    contig, extra = {"photometric": "minisblack"}, {"photometric": "rgb"} if channels > 3 else {}
    files = [
        *(npy(values), npy(np.asfortranarray(values)), npy(values.astype(">u2"))),
        *(npy(values / 255.0), npy(values.astype(np.float32)), values),
        tiff(values, planarconfig="contig", **contig),
        tiff(planes, planarconfig="separate", **contig),
        tiff(planes, metadata={"axes": "CYX"}, **contig),
        *([tiff(values, **extra)] if extra else []),
    ]
    for file in files:
        assert np.array_equal(decode.pixels_of(file, "x", of(channels)), values)
    deep = values.astype(np.uint16) << 2
    deep[0, 0] = 1023
    for file in (npy(deep), tiff(deep, planarconfig="contig", **contig)):
        assert np.array_equal(decode.pixels_of(file, "x", of(channels)), deep >> 2)
        assert np.array_equal(decode.pixels_of(file, "x", of(channels, bits=16)), deep >> 8)


@pytest.mark.parametrize("dtype", ["|b1", "<u2", ">u2", "<i4", "<f2", "<f4", ">f8", "|u1", "|i1"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_are_numpys_in_every_type_and_version(dtype, version):
    for shape, order in (((7, 5), "C"), ((7, 5, 3), "C"), ((7, 5, 3), "F"), ((0, 5), "C")):
        values = np.asarray(numbers(*shape, most=100).astype(dtype), order=order)
        stream = io.BytesIO()
        np.lib.format.write_array(stream, values, version)
        ours = array_in(stream.getvalue())
        assert ours.dtype == values.dtype
        assert np.array_equal(ours, values)


def test_arrays_are_read_by_many_threads_at_once():
    files = [npy(numbers(4, 4, 5) + i) for i in range(50)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: array_in(files[i % 50]), range(5000)))
    assert all(np.array_equal(x, numbers(4, 4, 5) + i % 50) for i, x in enumerate(read))


BAD = {
    "objects": npy(np.array([[{}]]), allow_pickle=True),
    "text": npy(np.array([["a", "b"]])),
    "short": npy(numbers(8, 8, 5))[:-1],
    "long": npy(numbers(8, 8, 5)) + b"x",
    "header": npy(numbers(8, 8, 5))[:20],
    "huge": b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999999, 5), }".ljust(117)
    + b"\n",
    "empty": npy(np.zeros((0, 4, 5), np.uint8)),
    "flat": npy(numbers(80)),
    "turned about": npy(numbers(5, 8, 8)),
    "negative": npy(-numbers(8, 8, 5).astype(np.int16) - 1),
    "nan": npy(np.full((8, 8, 5), np.nan)),
    "tiff cut": tiff(numbers(80, 80, 5), photometric="minisblack", planarconfig="contig")[:300],
    "pickle": pickle.dumps(numbers(8, 8, 5)),
    "text file": b"no image",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_named_in_one_line(name):
    with pytest.raises(UserError, match=r"^data/7\.npy: ") as caught:
        decode.pixels_of(BAD[name], "data/7.npy", of(5))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("image", "channels", "have"),
    [
        (numbers(8, 9, 4), 5, 4),
        (npy(numbers(8, 9)), 13, 1),
        (npy(numbers(8, 9, 7)), 4, 7),
        (npy(numbers(8, 9, 2)), 1, 2),
        (tiff(numbers(8, 9, 3), photometric="rgb"), 5, 3),
        (tiff(numbers(8, 9, 13), photometric="minisblack", planarconfig="contig"), 12, 13),
        (encoded(Image.new("RGB", (8, 8)), "png"), 6, 3),
    ],
)
def test_other_channels_than_the_datas_are_refused(image, channels, have):
    text = f"x: mixed channels: {have} in this image, config.data.channels={channels}"
    with pytest.raises(MixedChannels, match=text):
        decode.pixels_of(image, "x", of(channels))


def test_a_missing_tifffile_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name == "tifffile":
            raise ModuleNotFoundError(name)
        return real(name, *args)

    file = tiff(numbers(8, 9, 5), photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"5 channels or .* pip install 'deit_jax\[tiff\]'"):
        decode.pixels_of(file, "x", of(5))


def outcome(file, channels):
    """Return the number of channels that are read, or what is said instead."""
    try:
        return decode.pixels_of(file, "x.tif", of(channels)).shape[2]
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_damaged_files_are_read_or_named(channels):
    """No byte that is turned, and no file that ends early, gives anything but one line."""
    rng, values = np.random.default_rng(0), numbers(9, 11, 5)
    packed = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
    files = [npy(values), tiff(values, **packed), tiff(np.moveaxis(values, -1, 0).copy())]
    files += [tiff(values[..., :4], photometric="rgb"), encoded(Image.new("RGBA", (9, 9)), "png")]
    logging.disable(logging.ERROR)  # of tifffile and Pillow, which say more than they raise
    for file in files:
        for _ in range(150):
            broken = bytearray(file)
            for at in rng.integers(0, min(len(file), 400), rng.integers(1, 4)):
                broken[at] = rng.integers(256)
            data = bytes(broken[: rng.integers(10, len(file))] if rng.random() < 0.2 else broken)
            said = outcome(data, channels)
            assert said == channels or said.startswith("x.tif: "), said
            assert said == channels or len(said.splitlines()) == 1, said
    logging.disable(logging.NOTSET)


def test_a_tiff_that_claims_gigabytes_is_refused():
    packed = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
    page = tiff(np.zeros((2000, 2000, 5), np.uint8), **packed)
    assert decode.pixels_of(page, "x", of(5)).shape == (2000, 2000, 5)
    claims, changed = bytearray(page), 0
    for number in (256, 257):  # width and height, as SHORT or LONG
        for kind in (3, 4):
            at = claims.find(struct.pack("<HHII", number, kind, 1, 2000))
            if at >= 0:
                claims[at : at + 12] = struct.pack("<HHII", number, kind, 1, 9000)
                changed += 1
    assert changed == 2
    with pytest.raises(UserError, match="405000000 bytes of pixels in a file of"):
        decode.pixels_of(bytes(claims), "x", of(5))


@pytest.mark.parametrize("channels", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_every_channel_is_seen_as_it_would_be_alone(channels, resize):
    """Pillow's resize of one channel; and PyTorch's, which knows no channel from another."""
    values = numbers(50, 70, channels)
    reading = Reading(resize, fill=tuple(range(channels)), channels=channels)
    seen = EvalView(32, 0.875, reading)(values, "x")
    assert seen.shape == (32, 32, channels)
    for i in range(channels):
        one = EvalView(32, 0.875, Reading(resize, fill=(i,), channels=1))
        assert np.array_equal(seen[:, :, i], one(values[:, :, i], "x")[:, :, 0])
    if resize == "squash":
        theirs = functional.interpolate(
            torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None],
            (32, 32),
            mode="bicubic",
            antialias=True,
        )
        theirs = theirs[0].permute(1, 2, 0).clamp(0, 255).numpy()
        gap = np.abs(seen - theirs)
        assert gap.mean() < 0.5  # Pillow rounds, and clips, between the two axes
        assert gap.max() < 6
    for crop in ("random_resized", "simple"):
        c = base.get_config().augment
        c.crop = crop
        views = [
            random_view(x, 24, c, np.random.default_rng(5), decoders.resize_pillow, how)
            for x, how in (
                (values, reading),
                (values[:, :, -1:], Reading(resize, fill=(channels - 1,), channels=1)),
            )
        ]
        assert views[0].shape == (24, 24, channels)
        assert np.array_equal(views[0][:, :, -1:], views[1])


GREY_OPS = {
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "Invert": lambda image, level: ImageOps.invert(image),
    "Posterize": lambda image, level: ImageOps.posterize(image, int(level / 10 * 4)),
    "Solarize": lambda image, level: ImageOps.solarize(image, int(level / 10 * 256)),
    "Color": lambda image, level: ImageEnhance.Color(image).enhance(level * 0.18 + 0.1),
    "Contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(level * 0.18 + 0.1),
    "Brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(level * 0.18 + 0.1),
    "Sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(level * 0.18 + 0.1),
    "Rotate": lambda image, level: image.rotate(
        level * 3, resample=Image.Resampling.BICUBIC, fillcolor=117
    ),
}


@pytest.mark.parametrize("name", GREY_OPS)
def test_grey_images_are_augmented_as_pillow_augments_them(name, monkeypatch):
    image = Image.fromarray(data.camera()).resize((96, 96))
    monkeypatch.setattr(augment.RandAugment, "level", lambda self, rng: 6.5)
    plain = augment.RandAugment((name,), num_ops=1, prob=1.0, grey=True)
    seed = next(s for s in range(99) if _sign(s) > 0)
    ours = augment.OfGrey(plain)(np.asarray(image)[:, :, None], np.random.default_rng(seed))
    assert ours.shape == (96, 96, 1)
    gap = np.abs(ours[:, :, 0].astype(int) - np.asarray(GREY_OPS[name](image, 6.5)).astype(int))
    assert gap.mean() < 0.06
    assert (gap > 1).mean() < 0.002


def _sign(seed):
    rng = np.random.default_rng(seed)
    rng.integers(1, size=1), rng.random()
    return 1 if rng.random() < 0.5 else -1


def test_grey_fill_is_the_grey_of_the_colour():
    fill = Image.new("RGB", (1, 1), image_ops.FILL).convert("L").getpixel((0, 0))
    assert fill == 117
    moved = augment.OfGrey(
        augment.RandAugment(("TranslateXRel",), 10.0, num_ops=1, prob=1.0, grey=True)
    )(np.zeros((20, 20, 1), np.uint8), np.random.default_rng(0))
    assert set(np.unique(moved)) == {0, 117}
    made = augment.make_augment("rand-m9-mstd0.5-inc1", 0.3, channels=1)
    assert isinstance(made, augment.OfGrey)
    assert made.augment.grey
    assert augment.make_augment("", 0.0, 1)(moved, np.random.default_rng(0)) is moved


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a data set of arrays in two classes and opens it."""

    def make(channels, kind="npy", odd=None, **fields):
        for label, name in enumerate(("low", "high")):
            (tmp_path / name).mkdir()
            for i in range(6):
                values = numbers(12, 14, channels, most=100) + 100 * label + i
                values = values.astype(np.uint8)
                if kind == "npy":
                    np.save(tmp_path / name / f"{i}.npy", values)
                else:
                    tifffile.imwrite(
                        tmp_path / name / f"{i}.tif",
                        values,
                        photometric="minisblack",
                        planarconfig="contig",
                    )
        if odd is not None:
            np.save(tmp_path / "low" / "odd.npy", odd)
        c = base.get_config()
        c.data.source, c.data.channels = f"folder:{tmp_path}", channels
        c.data.mean, c.data.std = (0.5,), (0.25,)
        c.augment.auto, c.augment.color_jitter = "", 0.0
        c.data.update(fields)
        return c

    return make


@pytest.mark.parametrize(("channels", "kind"), [(1, "npy"), (4, "npy"), (13, "npy"), (13, "tif")])
def test_folders_of_arrays_go_through_the_pipeline(write, channels, kind):
    c = write(channels, kind)
    dataset = open_dataset(c.data)
    assert len(dataset.train) + len(dataset.eval) == 12
    reading = reading_of(c.data)
    assert reading.fill == (128,) * channels
    order = EpochOrder(len(dataset.train), 4, 1, 0)
    batches = TrainBatches(dataset.train, order, c.augment, 8, range(4), reading=reading)
    batch = batches(0)
    assert batch["image"].shape == (4, 8, 8, channels)
    assert np.array_equal(batch["image"], batches(0)["image"])
    # The classes' values do not overlap, nor do a random part's.
    assert ((batch["image"].mean((1, 2, 3)) > 100) == (batch["label"] == 0)).all()
    held = EvalBatches(dataset.eval, 2, EvalView(8, 1.0, reading), range(2))(0)
    assert held["image"].shape == (2, 8, 8, channels)
    c.data.channels = 3
    if kind == "npy":  # which are no images then, as ever
        with pytest.raises(UserError, match="no class folders"):
            open_dataset(c.data)


def test_arrays_are_images_in_tables_and_tars_too(write, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    c = write(5)
    rows = [f"{name}/{i}.npy,{name}" for name in ("low", "high") for i in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))  # without a head
    c.data.labels = str(tmp_path / "labels.csv")
    dataset = open_dataset(c.data)
    assert len(dataset.train) + len(dataset.eval) == 12
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "train-0.tar", "w") as tar:
        for i, row in enumerate(rows):
            path, name = row.split(",")
            tar.add(tmp_path / path, f"{i}.npy")
            (tmp_path / "cls").write_text(str(int(name == "low")))
            tar.add(tmp_path / "cls", f"{i}.cls")
    c.data.labels, c.data.source = "", f"wds:{tars}"
    dataset = open_dataset(c.data)
    assert len(dataset.train) + len(dataset.eval) == 12
    pixels = decode.pixels_of(dataset.train[0]["image"], "x", of(5))
    assert pixels.shape == (12, 14, 5)
    c.data.channels = 3  # the index that was kept is not taken
    with pytest.raises(UserError, match="no images in its tars"):
        open_dataset(c.data)


def test_the_card_tells_channels_and_counts_those_that_do_not_fit(write, tmp_path, capsys):
    c = write(5, odd=numbers(9, 9, 4))
    made = card.make(open_dataset(c.data), "x", whole=True, reading=reading_of(c.data))
    assert made["channels"] == 5
    assert made["modes"] == {"5 channels": 12}
    assert made["formats"] == {"NPY": 12}
    assert made["unreadable"] == []
    (line,) = made["mixed_channels"]
    assert f"{tmp_path}/low/odd.npy: mixed channels: 4 in this image" in line
    text = "\n".join(card.lines(made))
    assert "5 channels an image" in text
    assert "mixed channels: 1 images do not fit, the first: " in text
    config = tmp_path.parent / "five.py"
    config.write_text(
        "from deit_jax.configs import base\ndef get_config():\n    c = base.get_config()\n"
        f"    c.data.source, c.data.channels = 'folder:{tmp_path}', 5\n"
        "    c.data.mean, c.data.std = (0.5,), (0.25,)\n    c.augment.auto = ''\n"
        "    c.augment.color_jitter = 0.0\n    return c\n"
    )
    assert program.main(["inspect", f"--config={config}", "--check"]) == 0
    assert "mixed channels: 1 images" in capsys.readouterr().out


def test_people_see_three_colours():
    values = numbers(2, 5, 6, 7)
    assert np.array_equal(as_colours(values), values[..., :3])
    grey = as_colours(values[..., :2])
    assert grey.shape == (2, 5, 6, 3)
    assert (grey == values[..., :1]).all()
