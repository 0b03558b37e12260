"""Compare decoding and cropping with Pillow and with torchvision's transforms."""

import io
import itertools

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import stats
from skimage import data
from sklearn.datasets import load_sample_image, load_sample_images

from deit_jax.data import decode, decoders
from deit_jax.errors import UserError

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TOLERANCE = 0.3  # mean absolute difference from Pillow, in levels of 255
DECODERS = decoders.available()


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_image("flower.jpg"))  # 640 x 427


@pytest.fixture
def transforms(timm):
    """Return torchvision.transforms; timm's import makes torchvision's work."""
    from torchvision import transforms

    return transforms


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image).astype(int)


def boxes(width, height, count, seed=0):
    rng = np.random.default_rng(seed)
    drawn = [decode.random_box(width, height, rng, SCALE, RATIO) for _ in range(count)]
    return np.array(drawn).T


def photographs():
    """Real photographs: two large ones, a grey one, a scan, one of few colours."""
    yield from load_sample_images().images
    yield from (data.coffee(), data.chelsea(), data.rocket(), data.camera(), data.page())


@pytest.mark.parametrize("shape", [(640, 427), (427, 640), (400, 400), (91, 500), (224, 224)])
@pytest.mark.parametrize(
    ("size", "ratio"), [(224, 0.875), (224, 0.9), (224, 1.0), (384, 1.0), (33, 0.95)]
)
def test_centre_crop_is_torchvisions_resize_and_center_crop(photo, transforms, shape, size, ratio):
    image = photo.resize(shape)
    reference = transforms.Compose(
        [
            transforms.Resize(int(size / ratio), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )(image)
    assert np.array_equal(decode.centre_crop(image, size, ratio), reference)


@pytest.mark.parametrize("box", [(0, 0, 640, 427), (100, 7, 321, 300), (639, 426, 1, 1)])
@pytest.mark.parametrize("size", [32, 224])
def test_a_random_crop_has_the_pixels_of_torchvisions_resized_crop(photo, transforms, box, size):
    left, top, width, height = box
    ours = decode.resized_crop(np.asarray(photo), box, size)
    reference = transforms.functional.resized_crop(
        photo, top, left, height, width, [size, size], transforms.InterpolationMode.BICUBIC
    )
    assert np.array_equal(ours, reference)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (96, 96), (300, 1200)])
def test_random_boxes_are_distributed_as_torchvisions(torch, transforms, width, height):
    torch.manual_seed(0)
    image, count = Image.new("RGB", (width, height)), 1500
    params = transforms.RandomResizedCrop.get_params
    top, left, h, w = np.array([params(image, SCALE, RATIO) for _ in range(count)]).T
    ours = boxes(width, height, count)
    for measure in (
        lambda left, top, w, h: w * h,
        lambda left, top, w, h: np.log(w / h),
        lambda left, top, w, h: left,
        lambda left, top, w, h: top,
    ):
        assert stats.ks_2samp(measure(*ours), measure(left, top, w, h)).pvalue > 0.01


def test_random_boxes_stay_inside_the_image_and_the_bounds():
    left, top, w, h = boxes(500, 375, 2000)
    assert min(left.min(), top.min()) >= 0
    assert (left + w).max() <= 500
    assert (top + h).max() <= 375
    # A side is rounded to whole pixels: half a pixel of at least 122 = sqrt(.08 x 187500).
    assert np.all(np.abs(np.log(w / h)) < np.log(4 / 3) + 0.01)
    assert np.all(w * h > 0.08 * 500 * 375 * 0.99)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(1000, 20, (486, 0, 27, 20)), (20, 1000, (0, 486, 20, 27)), (1, 1, (0, 0, 1, 1))],
)
def test_an_extreme_image_gives_its_centre(torch, transforms, width, height, box):
    image = Image.new("RGB", (width, height))
    torch.manual_seed(1)
    top, left, h, w = transforms.RandomResizedCrop.get_params(image, (0.9, 1.0), RATIO)
    assert (left, top, w, h) == box
    assert decode.random_box(width, height, np.random.default_rng(0), (0.9, 1.0), RATIO) == box


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *itertools.product(("png", "tiff"), ("RGB", "L", "LA", "1", "RGBA", "P")),
        *itertools.product(("webp",), ("RGB", "L", "RGBA")),
    ],
)
def test_reads_every_mode_as_pillow_converts_it(photo, mode, kind):
    image = photo.resize((64, 48)).convert(mode)
    options = {"lossless": True} if kind == "webp" else {}
    ours = decode.decode(encode(image, kind, **options), "example")
    assert ours.mode == "RGB"
    assert np.array_equal(ours, image.convert("RGB"))


def test_reads_progressive_grey_and_cmyk_jpeg(photo):
    def through_jpeg(image, **options):
        encoded = encode(image, "jpeg", quality=95, **options)
        assert Image.open(io.BytesIO(encoded)).mode == image.mode
        return pixels(decode.decode(encoded, "example"))

    plain = through_jpeg(photo)
    assert np.abs(plain - pixels(photo)).mean() < 3
    # The same coefficients in another order.
    assert np.array_equal(through_jpeg(photo, progressive=True), plain)
    grey = through_jpeg(photo.convert("L"))
    assert np.ptp(grey, axis=2).max() == 0
    assert np.abs(grey[:, :, 0] - pixels(photo.convert("L"))).mean() < 3
    assert np.abs(through_jpeg(photo.convert("CMYK")) - pixels(photo)).mean() < 3


@pytest.mark.parametrize("kind", [".png", ".tiff", ".pgm"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.arange(0, 65536, 8, np.uint16).reshape(64, 128)
    ours = decode.decode(cv2.imencode(kind, values)[1].tobytes(), "example")
    assert np.array_equal(ours, np.stack(3 * [values // 256], axis=2))


def test_16_bit_colour_is_scaled_alike():
    values = np.random.default_rng(0).integers(65536, size=(16, 16, 3)).astype(np.uint16)
    ours = decode.decode(cv2.imencode(".png", values)[1].tobytes(), "example")
    assert np.array_equal(ours, values[:, :, ::-1] // 256)


def test_a_palette_with_transparency_keeps_its_colours(photo):
    image = photo.resize((64, 48)).quantize(8)
    encoded = encode(image, "png", transparency=bytes([0, 60, 255, 255]))
    assert np.array_equal(decode.decode(encoded, "example"), image.convert("RGB"))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (1, 5, 3), (5, 1, 3), (1, 1, 1)])
def test_reads_arrays_of_any_shape(shape):
    array = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)
    ours = decode.decode(array, "example")
    expected = np.broadcast_to(array.reshape((*shape[:2], -1)), (*shape[:2], 3))
    assert np.array_equal(ours, expected)


def damaged():
    photo = Image.fromarray(data.chelsea())
    yield "empty", b""
    yield "text", b"<html>404 not found</html>"
    for kind in ("jpeg", "png", "webp", "tiff", "gif", "bmp"):
        encoded = encode(photo, kind)
        for share in (0.05, 0.5, 0.9):
            yield f"{kind}-{share}", encoded[: int(share * len(encoded))]


@pytest.mark.parametrize(("kind", "image"), [pytest.param(*p, id=p[0]) for p in damaged()])
def test_a_damaged_file_is_named_in_one_line(kind, image):
    with pytest.raises(UserError, match=r"^photos/cat\.jpg: not a readable image \(.+\); .*") as e:
        decode.decode(image, "photos/cat.jpg")
    assert "\n" not in str(e.value)
    assert "BytesIO" not in str(e.value)


def test_an_enormous_image_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"x\.png: .*decompression bomb"):
        decode.decode(encode(Image.new("RGB", (64, 64)), "png"), "x.png")


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("size", [48, 224])
def test_every_decoder_is_within_the_tolerance_of_pillow(name, size):
    """Crops of real photographs in JPEG files, against Pillow's decode, crop and resize."""
    decoder, rng, gaps = decoders.choose(name), np.random.default_rng(0), []
    for number, photograph in enumerate(photographs()):
        options = {"quality": 94, "subsampling": 2 * (number % 2), "progressive": number == 2}
        encoded = encode(Image.fromarray(photograph), "jpeg", **options)
        image, ours = Image.open(io.BytesIO(encoded)).convert("RGB"), None
        ours = decode.read(encoded, "example", decoder)
        for _ in range(8):
            box = decode.random_box(*image.size, rng, SCALE, RATIO)
            left, top, w, h = box
            reference = image.crop((left, top, left + w, top + h)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
            crop = decode.resized_crop(ours, box, size, decoder.resize)
            assert (crop.shape, crop.dtype) == ((size, size, 3), np.uint8)
            gaps.append(np.abs(pixels(crop) - pixels(reference)).mean())
    assert max(gaps) <= (TOLERANCE if name != "pillow" else 0)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (300, 2), (2, 300), (224, 224), (500, 224)])
def test_every_resizer_takes_any_shape_and_keeps_a_flat_image_flat(name, shape):
    resized = decoders.choose(name).resize
    for value in (0, 1, 77, 254, 255):
        flat = np.full((*shape, 3), value, np.uint8)
        assert np.array_equal(resized(flat, 224, 224), np.full((224, 224, 3), value)), value
        assert resized(flat, 30, 40).shape == (40, 30, 3)
    photo = np.ascontiguousarray(data.astronaut()[:100, :100])
    box = (40, 30, 60, 70)
    inside = photo.copy()
    inside[:30], inside[:, :40] = 255, 0  # what is outside the part must not bleed into it
    crops = [decode.resized_crop(p, box, 64, resized) for p in (photo, inside)]
    assert np.array_equal(*crops)


def real_files(photo):
    """Make one file of each awkward kind from a real photograph."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    yield "jpeg", encode(photo, "jpeg", quality=94)
    yield "jpeg-444", encode(photo, "jpeg", quality=94, subsampling=0)
    yield "jpeg-rgb", encode(photo, "jpeg", quality=94, keep_rgb=True)
    yield "progressive", encode(photo, "jpeg", quality=94, progressive=True)
    yield "restarts", encode(photo, "jpeg", quality=94, restart_marker_rows=2)
    yield "cmyk", encode(photo.convert("CMYK"), "jpeg", quality=94)
    yield "grey", encode(photo.convert("L"), "jpeg", quality=94)
    yield "rotated", encode(photo, "jpeg", quality=94, exif=exif)
    yield "trailing", encode(photo, "jpeg", quality=94) + b"\0" * 99
    yield "palette", encode(photo.quantize(64), "png")
    yield "transparent", encode(photo.convert("RGBA"), "png")
    yield "16-bit", cv2.imencode(".png", np.asarray(photo).astype(np.uint16) * 257)[1].tobytes()
    yield "webp", encode(photo, "webp", quality=90)
    yield "bilevel", encode(photo.convert("1"), "tiff")


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_reads_every_kind_of_file_as_pillow(photo, name):
    for kind, encoded in real_files(photo):
        ours = decode.read(encoded, "example", decoders.choose(name))
        assert ours.shape == (427, 640, 3), kind  # the turned one too, as torchvision loads it
        gap = np.abs(pixels(ours) - pixels(decode.decode(encoded, "example"))).mean()
        assert gap <= TOLERANCE / 3, kind
        loss = np.abs(pixels(ours).mean(axis=2) - pixels(photo).mean(axis=2)).mean()
        assert loss < 6 or kind in ("bilevel", "grey"), kind


def test_pixels_lie_in_the_scratch_if_they_fit(photo):
    encoded, decoder = encode(photo, "jpeg", quality=94), decoders.choose(DECODERS[-1])
    alone = decode.read(encoded, "example", decoder)
    for size in (0, 427 * 640 * 3 - 1, 427 * 640 * 3, 2**20):
        scratch = np.zeros(size, np.uint8)
        ours = decode.read(encoded, "example", decoder, scratch)
        assert np.array_equal(ours, alone)
        fits = decoder.jpeg and size >= ours.size
        assert np.shares_memory(ours, scratch) == fits


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_names_a_damaged_file(photo, name):
    for kind, encoded in real_files(photo):
        if kind not in ("trailing", "bilevel"):
            for share in (0.02, 0.5, 0.97):
                with pytest.raises(UserError, match=r"^a/b\.jpg: not a readable image \(.+\)"):
                    decode.read(
                        encoded[: int(share * len(encoded))], "a/b.jpg", decoders.choose(name)
                    )


def test_auto_is_the_fastest_decoder_installed(monkeypatch):
    assert decoders.choose("auto").name == DECODERS[-1]
    for missing in ("simplejpeg", "kornia_rs cykooz_resizer"):
        monkeypatch.setattr(
            decoders.importlib.util, "find_spec", lambda name, m=missing: None if name in m else 1
        )
        assert decoders.choose("auto").name == "pillow"
    with pytest.raises(UserError, match=r"decoder='fast' is not installed: pip install simplejpeg"):
        decoders.choose("fast")
    assert "pillow 1" in str(decoders.choose("auto"))


def test_random_crops_depend_on_nothing_but_the_generator():
    first = [decode.random_box(640, 427, np.random.default_rng(s), SCALE, RATIO) for s in range(20)]
    again = [decode.random_box(640, 427, np.random.default_rng(s), SCALE, RATIO) for s in range(20)]
    assert first == again
    assert all(a != b for a, b in itertools.pairwise(first))


def test_the_crop_of_a_drawing_shows_its_middle():
    """A black disc at the centre stays there, whatever the image's shape."""
    for shape in ((300, 200), (200, 300), (201, 333)):
        image = Image.new("L", shape, 255)
        x, y = shape[0] / 2, shape[1] / 2
        ImageDraw.Draw(image).ellipse((x - 30, y - 30, x + 30, y + 30), fill=0)
        dark = pixels(decode.centre_crop(image.convert("RGB"), 64, 0.875))[:, :, 0] < 128
        assert np.abs(np.argwhere(dark).mean(axis=0) - 31.5).max() < 1


def test_simple_random_crop_is_a_window_of_the_reflected_resized_image(photo):
    """Pad with Pillow's own reflection, then find the crop in it."""
    size = 48
    resized = decode.resize_shorter(photo, size)
    assert min(resized.size) == size
    array = np.asarray(resized)
    padded = np.concatenate([array[4:0:-1], array, array[-2:-6:-1]], axis=0)
    padded = np.concatenate([padded[:, 4:0:-1], padded, padded[:, -2:-6:-1]], axis=1)
    places = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        crop = decode.simple_random_crop(np.asarray(photo), size, rng)
        windows = np.lib.stride_tricks.sliding_window_view(padded, crop.shape)[:, :, 0]
        found = np.argwhere((windows == crop).all((2, 3, 4)))
        assert len(found) >= 1
        places.add(tuple(found[0]))
    assert len(places) > 10
