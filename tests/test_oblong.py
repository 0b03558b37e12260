"""Images of two sides: the model as timm's, the views as timm's and torchvision's, whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import deit_jax
from deit_jax import __main__ as program
from deit_jax.analysis import attention
from deit_jax.config.serialize import from_json, to_json
from deit_jax.configs import base
from deit_jax.data import decode
from deit_jax.data.batches import TrainBatches
from deit_jax.data.decode import Reading
from deit_jax.data.decoders import resize_pillow
from deit_jax.data.order import EpochOrder
from deit_jax.data.sources.base import ArraySource
from deit_jax.data.sources.registry import open_dataset
from deit_jax.data.view import EvalView, random_view
from deit_jax.errors import UserError
from deit_jax.models.build import build_model, image_size
from deit_jax.models.pos_embed import resize_pos_embed
from deit_jax.models.registry import create_model
from deit_jax.perf import flops, plan
from deit_jax.shapes import sides, simplest, text
from deit_jax.step.mixup import cutmix_box
from deit_jax.step.random_erasing import random_erase
from deit_jax.step.teacher import FrozenTeacher
from deit_jax.train.run import train
from deit_jax.train.validate import validate
from deit_jax.weights import convert
from deit_jax.weights.load import load_variables, open_model
from deit_jax.weights.torch_names import to_torch
from tests.test_convert import opened
from tests.timm_reference import import_timm, import_torch, import_transformers
from tests.tiny import make_tiny_config, resolved

MEAN = (0.485, 0.456, 0.406)
SIZES = [(64, 96), (96, 64), (48, 33), (224, 320)]
SHAPES = [(160, 107), (107, 160), (100, 100), (91, 300), (20, 30), (300, 20)]
OBLONG = {"image_size": (32, 48), "depth": 2}
NAMES = ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"]


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_image("flower.jpg")).resize((320, 213))


def test_sizes_in_words():
    assert sides(224) == (224, 224)
    assert sides((2, 3)) == (2, 3)
    assert simplest((224, 224)) == 224
    assert simplest((2, 3)) == (2, 3)
    assert [text(x) for x in (224, (224, 224), (224, 320))] == ["224", "224x224", "224x320"]


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_gradients_are_timms(name):
    timm, torch = import_timm(), import_torch()
    first = opened(name, OBLONG)
    theirs = timm.create_model(name, num_classes=3, img_size=(32, 48), depth=2).eval()
    flat = {k: torch.from_numpy(v) for k, v in to_torch(first.variables).items()}
    theirs.load_state_dict(flat, strict=True)
    images = np.random.default_rng(1).normal(size=(2, 32, 48, 3)).astype(np.float32)
    weight = np.random.default_rng(2).normal(size=(2, 3)).astype(np.float32)

    def loss(params):
        heads = first.model.apply({"params": params}, jnp.asarray(images))
        return jnp.sum(weight * heads.fused()), heads.fused()

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(first.variables["params"])
    answer = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(ours, answer.detach().numpy(), rtol=1e-4, atol=1e-4)
    (answer * torch.from_numpy(weight)).sum().backward()
    np.testing.assert_allclose(
        grads["pos_embed"], theirs.pos_embed.grad.numpy(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", ["regnety_002", "efficientnet_lite0"])
def test_convnets_take_two_sides_as_timms_do(name):
    timm, torch = import_timm(), import_torch()
    first = opened(name, {}, std=0.05)
    theirs = timm.create_model(f"tf_{name}" if "lite" in name else name, num_classes=3).eval()
    flat = {k: torch.from_numpy(v) for k, v in to_torch(first.variables).items()}
    theirs.load_state_dict(flat, strict=True)
    images = np.random.default_rng(1).normal(size=(2, 64, 96, 3)).astype(np.float32)
    ours = jax.jit(first.model.apply)(first.variables, images).cls
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (14, 20)), ((14, 14), (7, 9)), ((4, 6), (5, 5)), ((4, 6), (3, 8))]
)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_positions_are_resized_as_timm_does(old, new, prefix):
    timm, torch = import_timm(), import_torch()
    embedding = np.random.default_rng(0).normal(size=(1, prefix + old[0] * old[1], 8))
    embedding = embedding.astype(np.float32)
    ours = resize_pos_embed(jnp.asarray(embedding), prefix, new, old)
    theirs = timm.layers.resample_abs_pos_embed(
        torch.from_numpy(embedding), list(new), list(old), prefix, antialias=False
    )
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is not 1 and a grid of 3x5"):
        resize_pos_embed(jnp.zeros((1, 15, 4)), 1, 7, (3, 5))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_evaluation_shows_what_timm_shows(photo, size, shape, mode, timm):
    transform = timm.data.create_transform(
        (3, *size),
        is_training=False,
        interpolation="bicubic",
        crop_pct=0.875 if mode == "crop" else 1.0,
        crop_mode={"crop": "center", "squash": "squash", "pad": "border"}[mode],
        mean=MEAN,
        normalize=False,
    )
    image = photo.resize(shape)
    theirs = np.asarray(transform(image)).transpose(1, 2, 0)
    if theirs.dtype != np.uint8:
        theirs = np.rint(255 * theirs)
    reading = Reading(mode, fill=tuple(round(255 * v) for v in MEAN))
    ours = np.asarray(EvalView(size, 0.875, reading).crop(image))
    assert ours.shape == (*size, 3)
    assert np.array_equal(ours, theirs)


def test_training_crops_are_torchvisions(photo, timm, torch):
    """The same box, by Pillow, at the two sides; the box is drawn as ever."""
    from torchvision.transforms import functional

    pixels, c = np.asarray(photo), base.get_config().augment
    for seed in range(5):
        view = random_view(pixels, (40, 56), c, np.random.default_rng(seed), resize_pillow)
        box = decode.random_box(320, 213, np.random.default_rng(seed), c.crop_scale, c.crop_ratio)
        left, top, width, height = box
        theirs = functional.resized_crop(
            photo, top, left, height, width, [40, 56], functional.InterpolationMode.BICUBIC
        )
        assert np.array_equal(view, theirs)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("shape", SHAPES)
def test_simple_crops_and_padded_parts_have_the_size(photo, resize, shape):
    c = base.get_config().augment
    image = np.asarray(photo.resize(shape))
    for crop in ("simple", "random_resized"):
        c.crop = crop
        for size in ((24, 40), (40, 24)):
            how = Reading(resize, fill=(1, 2, 3))
            view = random_view(image, size, c, np.random.default_rng(0), resize_pillow, how)
            assert view.shape == (*size, 3)
    if resize == "pad":  # all of the canvas is the whole image: as evaluation shows it
        c.crop, c.crop_scale, c.crop_ratio = "random_resized", (1.0, 1.0), (24 / 40, 40 / 24)
        how = Reading("pad", fill=(9, 9, 9))
        across, down = (
            max(shape[0], round(shape[1] * 40 / 24)),
            max(shape[1], round(shape[0] * 24 / 40)),
        )
        padded = np.full((down, across, 3), 9, np.uint8)
        top, left = (down - shape[1]) // 2, (across - shape[0]) // 2
        padded[top : top + shape[1], left : left + shape[0]] = image
        boxes = decode.random_box(
            across, down, np.random.default_rng(3), c.crop_scale, c.crop_ratio
        )
        left, top, width, height = boxes
        part = padded[top : top + height, left : left + width]
        view = random_view(image, (24, 40), c, np.random.default_rng(3), resize_pillow, how)
        assert np.array_equal(view, resize_pillow(part, 40, 24))


def test_a_batch_has_two_sides():
    source = ArraySource("x", np.zeros((8, 20, 20, 3), np.uint8), np.zeros(8, np.int32))
    c = base.get_config().augment
    batch = TrainBatches(source, EpochOrder(8, 6, 3, 0), c, (16, 24), range(6))(0)
    assert batch["image"].shape == (6, 16, 24, 3)


def test_boxes_of_mixing_and_erasing_know_both_sides():
    """A box of share s has sides of sqrt(s) of each; lambda is 1 - its area (timm 0.3.2's)."""
    lam = jnp.full(2000, 0.75)
    boxes = np.asarray(cutmix_box(jax.random.key(0), lam, 40, 80))
    tall, wide = boxes.any(2).sum(1), boxes.any(1).sum(1)
    assert (tall.max(), wide.max()) == (20, 40)
    assert boxes.any((0, 2)).all()
    assert boxes.any((0, 1)).all()
    images = jnp.zeros((500, 32, 64, 1))
    erased = np.asarray(random_erase(jax.random.key(1), images, 1.0)) != 0
    share = erased.mean((1, 2, 3))
    assert 0.015 < share.min() < 0.05
    assert 0.25 < share.max() < 0.36
    assert erased[..., 0].any((0, 2)).all()
    assert erased[..., 0].any((0, 1)).all()


def test_a_teachers_images_are_resized_to_its_own_sides():
    class Echo:
        def apply(self, variables, images, **_):
            return images

    teacher = FrozenTeacher(Echo(), MEAN, MEAN, MEAN, MEAN, (8, 12))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    seen = teacher.outputs({}, jnp.asarray(images)).heads
    expected = jax.image.resize(images, (2, 8, 12, 3), "cubic")
    np.testing.assert_allclose(seen, expected)
    for size in (None, 16, (16, 16)):
        same = FrozenTeacher(Echo(), MEAN, MEAN, MEAN, MEAN, size)
        assert np.array_equal(same.outputs({}, jnp.asarray(images)).heads, images)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((224, 100), r"model.image_size=\(224, 100\) is not a multiple of model.patch_size=16"),
        ((8, 224), r"model.image_size=\(8, 224\) is smaller than one patch"),
        ((224, 0), "must be a whole number between 1 and"),
        ((224, 224, 3), "must be a whole number between 1 and"),
        ((224.0, 224), "must be a whole number between 1 and"),
        ("224x320", "must be a whole number between 1 and"),
        (True, "must be a whole number between 1 and"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        create_model("deit_tiny_patch16_224", image_size=size)
    c = base.get_config()
    c.model.image_size = size

    def check():
        validate(c, 1)
        build_model(c.model, 2)

    with pytest.raises(UserError, match=r"config\.model\.image_size=") as caught:
        check()
    assert len(str(caught.value).splitlines()) == 1


def test_square_tuples_are_squares():
    name = "deit_tiny_patch16_224"
    assert create_model(name, image_size=(224, 224)) == create_model(name)
    c = make_tiny_config()
    c.model.image_size = (16, 16)
    assert image_size(c.model) == 16
    assert build_model(c.model, 10) == build_model(make_tiny_config().model, 10)


@pytest.mark.parametrize("to", ["timm", "timm_folder", "deit_jax", "huggingface", "deit"])
def test_weights_keep_their_sides(to, tmp_path, caplog):
    first = opened("deit_tiny_distilled_patch16_224", OBLONG)
    path = tmp_path / {"timm": "w.safetensors", "deit": "w.pth"}.get(to, "w")
    convert.convert(first, path, to)
    untold = "cannot tell other programs model.image_size=(32, 48)" in caplog.text
    assert untold == (to not in ("deit_jax", "timm_folder"))
    if to == "deit":  # which says nothing: 2 x 3 patches are no square
        with pytest.raises(ValueError, match="is no square grid; give the size"):
            load_variables(path, "deit_tiny_distilled_patch16_224")
        c = make_tiny_config().model
        c.name, c.depth, c.patch_size, c.width = "deit_tiny_distilled_patch16_224", 2, None, None
        c.image_size = (32, 48)
        assert load_variables(path, c).model.grid_size == (2, 3)
        return
    second = open_model(path)
    assert second.model == first.model
    assert second.image_size == (32, 48)
    assert second.view.size == (32, 48)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(second.variables), first.variables)


def test_transformers_takes_an_oblong_model(tmp_path):
    transformers, torch = import_transformers(), import_torch()
    first = opened("deit_tiny_patch16_224", OBLONG)
    convert.convert(first, tmp_path / "hf", "huggingface")
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    images = np.random.default_rng(1).normal(size=(2, 32, 48, 3)).astype(np.float32)
    ours = jax.jit(first.model.apply)(first.variables, images).fused()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_timm_folder_says_two_sides(tmp_path, torch):
    from safetensors.numpy import save_file

    first = opened("deit_tiny_patch16_224", {"image_size": (32, 48)})
    save_file(to_torch(first.variables), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "deit_tiny_patch16_224",
                "pretrained_cfg": {"input_size": [3, 32, 48], "mean": [0.5] * 3, "std": [0.5] * 3},
            }
        )
    )
    second = open_model(tmp_path)
    assert second.image_size == (32, 48)
    assert second.model.grid_size == (2, 3)


def test_square_weights_become_oblong_by_the_command(tmp_path, capsys):
    first = opened("deit_tiny_patch16_224", {"image_size": 32, "depth": 2})
    convert.convert(first, tmp_path / "w.safetensors")
    for words in ("--image_size=32,64", "--image-size=32x64", "--image_size=(32,64)"):
        out = tmp_path / f"{len(words)}{words[-3]}.safetensors"
        assert program.main(["convert", str(tmp_path / "w.safetensors"), str(out), words]) == 0
        assert "position embedding resized from 2x2 to 2x4" in capsys.readouterr().out
        assert open_model(out).image_size == (32, 64)
    for wrong in ("--image_size=a", "--image_size=1,2,3", "--image_size=0,2"):
        argv = ["convert", str(tmp_path / "w.safetensors"), str(tmp_path / "x.pth"), wrong]
        assert program.main(argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    model, params = deit_jax.load(str(tmp_path / "w.safetensors"), image_size=(64, 32))
    assert model.grid_size == (4, 2)
    assert params["pos_embed"].shape == (1, 9, 192)


def test_configs_hold_both_kinds_and_come_back():
    c = make_tiny_config()
    for size in (16, (16, 24)):
        c.model.image_size, c.teacher.image_size = size, size
        again = from_json(to_json(c))
        assert again.model.image_size == size
        assert image_size(again.model) == size
        validate(c, 1)


def oblong_config():
    c = make_tiny_config()
    c.model.image_size = (12, 20)
    return c


def test_estimates_know_both_sides():
    c = oblong_config()
    experiment = resolved(c, open_dataset(c.data))
    _, (_, _, batch) = plan.lower_step(experiment)
    assert batch["image"].shape == (32, 12, 20, 3)
    c.model.image_size = 16
    square = resolved(c, open_dataset(c.data))
    tokens = (2 + 3 * 5, 2 + 16)
    ours, theirs = (flops.forward_flops(e.model, e.image_size) for e in (experiment, square))
    assert ours < theirs
    assert tuple(e.model.attention_shape(1)[1] for e in (experiment, square)) == tokens


def test_maps_are_spread_over_both_sides():
    weights = jnp.arange(6.0).reshape(1, 6)
    spread = attention.attention_on_image(weights, (4, 6))
    expected = np.kron(np.arange(6.0).reshape(2, 3) / 5, np.ones((2, 2)))
    np.testing.assert_allclose(spread[0], expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished oblong run, its config from the command line, and what it printed."""
    root = tmp_path_factory.mktemp("oblong")
    config, workdir = root / "c.py", root / "run"
    config.write_text(
        "from tests.tiny import make_tiny_config\n\n\ndef get_config():\n"
        "    c = make_tiny_config()\n    c.epochs, c.train.eval_every_epochs = 1.0, 1.0\n"
        "    c.optim.warmup_epochs, c.distill.kind = 0.0, 'none'\n    return c\n"
    )
    words = ["--config.model.image_size=(12,20)"]
    code = program.main(["train", f"--config={config}", f"--workdir={workdir}", *words])
    assert code == 0
    return workdir, config, words


def test_an_oblong_run_is_trained_resumed_reported_and_asked(run, tmp_path, capsys):
    workdir, config, words = run
    results = json.loads((workdir / "results.json").read_text())
    assert set(results) >= {"cls", "dist", "fused"}
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"]["image_size"] == [12, 20]
    assert program.main(["train", f"--config={config}", f"--workdir={workdir}", *words]) == 0
    capsys.readouterr()
    assert program.main(["analyze", f"--workdir={workdir}", "--images=40"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)["runs"]
    assert figures["patch_grid"] == [3, 5]
    assert np.array(figures["attention"]["images"][0]["rollout"]).shape == (2, 3, 5)
    assert len(figures["position_similarity"]) == 15
    assert program.main(["report", f"--workdir={workdir}", "--images=40"]) == 0
    assert "of 3 x 5: the cosine" in (workdir / "report.html").read_text()
    photo = tmp_path / "photo.png"
    Image.new("RGB", (30, 40)).save(photo)
    assert program.main(["predict", f"--weights={workdir}", str(photo)]) == 0
    sheet = tmp_path / "sheet.png"
    argv = ["inspect", f"--config={config}", f"--out={sheet}", *words]
    assert program.main(argv) == 0
    assert sheet.exists()


def test_a_square_teacher_sees_its_own_size(run, tmp_path):
    workdir, *_ = run
    c = make_tiny_config()
    c.teacher.weights, c.teacher.epochs = str(workdir), 0.0
    with pytest.raises(UserError, match=r"takes 12x20 px images, not 16;.*=\'\(12,20\)\'"):
        train(c, tmp_path / "other")
    c.teacher.image_size = (12, 20)
    c.epochs, c.optim.warmup_epochs = 1.0, 0.0
    assert "teacher" in train(c, tmp_path / "other")
