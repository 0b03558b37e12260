"""Models of other input channels: weights adapted as timm adapts them, and whole runs with them."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import deit_jax
from deit_jax import __main__ as program
from deit_jax.config.serialize import from_json, to_json
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.models import registry
from deit_jax.models.build import build_model
from deit_jax.models.family import Family, ModelSpec
from deit_jax.models.registry import create_model
from deit_jax.perf import flops, input_rate, plan
from deit_jax.shapes import input_shape
from deit_jax.train import memory, step_dump
from deit_jax.train.experiment import prepare
from deit_jax.train.run import starting_weights, train
from deit_jax.train.validate import validate
from deit_jax.weights import convert
from deit_jax.weights.first_layer import adapt_channels
from deit_jax.weights.load import load_variables, open_model
from deit_jax.weights.torch_names import to_torch
from tests.test_convert import FAMILIES, SMALL, opened
from tests.timm_reference import import_timm, import_torch, import_transformers
from tests.tiny import make_tiny_config, measured, resolved

VIT = {"img_size": 32, "depth": 2}
CHANNELS = [1, 2, 4, 13]


@pytest.mark.parametrize("channels", CHANNELS)
def test_the_first_layer_is_adapted_as_timm_does(channels, timm, torch):
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 8)).astype(np.float32)
    theirs = timm.models.adapt_input_conv(channels, torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
    theirs = theirs.numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(adapt_channels(kernel, channels), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "regnety_002"])
def test_loaded_weights_answer_as_timms_pretrained_model(name, channels, tmp_path):
    timm, torch = import_timm(), import_torch()
    torch.manual_seed(0)
    kwargs = VIT if "deit" in name else {}
    colour = timm.create_model(name, num_classes=5, **kwargs).eval()
    path = tmp_path / "w.pth"
    torch.save(colour.state_dict(), path)
    theirs = timm.create_model(
        name,
        num_classes=5,
        in_chans=channels,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 5},
        **kwargs,
    ).eval()
    model, params = (
        deit_jax.load(name, path, in_channels=channels)
        if not kwargs
        else _small(name, path, channels)
    )
    images = np.random.default_rng(1).normal(size=(2, 32, 32, channels)).astype(np.float32)
    ours = jax.jit(model.apply)({"params": params}, images).fused()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def _small(name, path, channels):
    """Load two blocks: the depth is a config's to say."""
    c = make_tiny_config().model
    c.name, c.image_size, c.depth = name, 32, 2
    c.patch_size = c.width = None
    fitted = load_variables(path, c, in_channels=channels)
    assert f"first layer adapted from 3 to {channels} channels" in fitted.notes
    return fitted.model, fitted.variables["params"]


def test_only_weights_of_colours_are_adapted(tmp_path):
    first = opened("deit_tiny_patch16_224", SMALL | {"in_channels": 4})
    convert.convert(first, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="reads 4 channels, the model's 13, and only"):
        load_variables(tmp_path / "w.safetensors", in_channels=13)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("name", "overrides"), FAMILIES)
def test_weights_of_other_channels_come_back_whole(name, overrides, channels, tmp_path):
    first = opened(name, overrides | {"in_channels": channels})
    mean, std = tuple(0.1 * i for i in range(channels)), (0.5,) * channels
    first = dataclasses.replace(
        first,
        mean=mean,
        std=std,
        reading=dataclasses.replace(first.reading, channels=channels, fill=(0,) * channels),
    )
    for to in ("timm", "deit_jax", "deit"):
        path = tmp_path / {"timm": "w.safetensors", "deit_jax": "w", "deit": "w.pth"}[to]
        convert.convert(first, path, to)
        c = make_tiny_config().model
        default = None
        if to == "deit":  # which says nothing of itself
            default = c
            for key in ("image_size", "patch_size", "width", "depth", "widths", "depths"):
                c[key] = overrides.get(key)
            c.stem_width = overrides.get("stem_width")
            c.name = name
        second = open_model(path, default=default)
        assert second.model.in_channels == channels
        assert second.view.reading.channels == channels
        jax.tree.map(
            np.testing.assert_array_equal, jax.device_get(second.variables), first.variables
        )
        known = (second.mean, second.std)
        assert known == (((), ()) if to == "deit" and channels != 1 else known)
        if to != "deit":
            np.testing.assert_allclose(known, (mean, std))
        elif channels != 1:
            with pytest.raises(ValueError, match=f"the mean and std of its {channels} channels"):
                second.check_convention()


def test_hugging_face_takes_the_channels(tmp_path):
    transformers, torch = import_transformers(), import_torch()
    first = opened("deit_tiny_patch16_224", SMALL | {"in_channels": 4})
    first = dataclasses.replace(first, mean=(0.5,) * 4, std=(0.5,) * 4)
    convert.convert(first, tmp_path / "hf", "huggingface")
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.num_channels == 4
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 4)).astype(np.float32)
    ours = jax.jit(first.model.apply)(first.variables, images).fused()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    assert open_model(tmp_path / "hf").model.in_channels == 4


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "regnety_002", "efficientnet_lite0"])
def test_new_models_have_timms_shapes(name, timm):
    theirs = timm.create_model(f"tf_{name}" if "lite" in name else name, in_chans=5)
    model = create_model(name, in_channels=5)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), np.zeros(input_shape(model, 224), np.float32)
    )
    flat = to_torch(jax.tree.map(lambda x: np.zeros(x.shape), shapes))
    expected = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in flat.items()} == expected


def many(channels=5):
    c = make_tiny_config()
    c.data.channels, c.data.mean, c.data.std = channels, (0.5,), (0.25,)
    c.augment.auto, c.augment.color_jitter = "", 0.0
    return c


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("model.in_channels", 4, "config.model.in_channels=4: config.data.channels=5"),
        ("teacher.model.in_channels", 3, "config.teacher.model.in_channels=3: config.data.chan"),
        ("data.mean", (0.5, 0.5, 0.5), "config.data.mean=(0.5, 0.5, 0.5): these are 3, and"),
        ("data.std", (0.5,) * 4, "data.channels=5; give one for each channel"),
        ("data.mean", (), "must be one or more numbers"),
        ("augment.auto", "3aug", "config.augment.auto='3aug': is for colours or grey"),
        ("augment.color_jitter", 0.4, "config.augment.color_jitter=0.4: is for colours or grey"),
        ("data.channels", 0, "must be between 1 and 512"),
    ],
)
def test_what_contradicts_the_channels_is_refused(field, value, text):
    c = many()
    validate(c, 1)
    c.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as caught:
        validate(c, 1)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_of_colours_alone_says_so(monkeypatch):
    class Toy(nn.Module):
        num_classes: int
        dtype: Any = np.float32

    family = Family(Toy, {"toy": ModelSpec(Toy, {})}, ("fc",))
    monkeypatch.setitem(registry.FAMILIES, "toy", family)
    c = many().model
    c.name = "toy"
    for key in ("image_size", "patch_size", "width", "depth", "drop_path"):
        c[key] = None
    build_model(c, 5, channels=3)
    with pytest.raises(UserError, match="toy has no field in_channels and takes colours alone"):
        build_model(c, 5, channels=5)
    with pytest.raises(ValueError, match="toy has no such field"):
        deit_jax.load("toy", in_channels=5)


def test_imagenets_mean_is_not_taken_for_grey():
    c = make_tiny_config()
    c.data.channels = 1
    with pytest.raises(UserError, match=r"as in '\(0\.449,\)' and '\(0\.226,\)'"):
        validate(c, 1)
    c.data.mean, c.data.std = (0.449,), (0.226,)
    validate(c, 1)  # RandAugment too: grey is defined


def test_older_configs_have_three_channels():
    values = to_json(make_tiny_config())
    del values["data"]["channels"], values["model"]["in_channels"]
    old = from_json(values)
    assert old.data.channels == 3
    assert old.model.in_channels is None
    assert build_model(old.model, 5, channels=old.data.channels).in_channels == 3


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Five-channel images of two classes, which the fourth channel tells apart, as arrays."""
    root, rng = tmp_path_factory.mktemp("fields"), np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 12)):
        for label in range(2):
            (root / part / str(label)).mkdir(parents=True)
            for i in range(count):
                values = rng.integers(0, 200, (20, 24, 5)).astype(np.uint16)
                values[..., 3] += 800 * label
                np.save(root / part / str(label) / f"{i}.npy", values)
    return root


@pytest.fixture(scope="module")
def run(fields, tmp_path_factory):
    """A finished run of student and teacher on five channels."""
    c = many()
    c.data.source, c.data.bits = f"folder:{fields}", 10
    c.model.image_size = (12, 16)
    c.epochs, c.teacher.epochs, c.augment.repeats = 6.0, 4.0, 1
    c.optim.warmup_epochs, c.optim.lr, c.batch_size = 1.0, 3e-3, 16
    c.mixing.prob, c.train.eval_batch_size = 0.5, 16
    c.train.eval_every_epochs = 6.0
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, c, train(c, workdir)


def test_a_run_learns_what_only_another_channel_tells(run):
    workdir, _, results = run
    assert results["examples"] == 24
    assert results["fused"]["top1"] == 100
    assert results["teacher"]["top1"] > 90
    card = json.loads((workdir / "data_card.json").read_text())
    assert card["channels"] == 5
    assert (workdir / "picture.png").exists()


def test_a_run_is_evaluated_predicted_reported_and_converted(run, fields, tmp_path, capsys):
    workdir, _, results = run
    config = tmp_path / "c.py"
    config.write_text(
        "from deit_jax.configs import base\ndef get_config():\n    c = base.get_config()\n"
        f"    c.data.source = 'folder:{fields}'\n    c.train.eval_batch_size = 16\n    return c\n"
    )
    assert program.main(["eval", f"--config={config}", f"--workdir={workdir}", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["fused"] == results["fused"]
    images = [str(fields / "val" / str(label) / "0.npy") for label in range(2)]
    assert program.main(["predict", f"--weights={workdir}", "--json", *images]) == 0
    said = json.loads(capsys.readouterr().out)["results"]
    assert [x["predictions"][0]["class"] for x in said] == ["0", "1"]
    assert program.main(["analyze", f"--workdir={workdir}"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)["runs"]
    assert figures["evaluation"]["top1"]["fused"] == 100
    assert figures["patch_grid"] == [3, 4]
    assert np.array(figures["patch_filters"]).shape[-1] == 5
    assert program.main(["report", f"--workdir={workdir}"]) == 0
    assert "5 channels an image" in (workdir / "report.html").read_text()
    file = tmp_path / "w.safetensors"
    assert program.main(["convert", str(workdir), str(file)]) == 0
    assert open_model(file).mean == (0.5,) * 5
    capsys.readouterr()
    assert program.main(["predict", f"--weights={file}", "--json", *images]) == 0
    assert "predictions" in capsys.readouterr().out
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    assert program.main(["predict", f"--weights={workdir}", str(photo)]) == 1
    assert "mixed channels: 3 in this image" in capsys.readouterr().err


def test_a_teacher_of_other_channels_is_refused(run, tmp_path, capsys):
    workdir, *_ = run
    c = make_tiny_config()
    c.teacher.weights, c.teacher.epochs = str(workdir / "teacher"), 0.0
    with pytest.raises(UserError, match=r"takes images of 5 channels, and config\.data"):
        train(c, tmp_path / "other")


def test_a_run_starts_from_weights_of_colours(run, tmp_path, caplog):
    """The adapted layer is where training begins; the rest is as it was."""
    c = many()
    c.init.head = "drop"
    first = opened("deit_tiny_distilled_patch16_224", SMALL)
    convert.convert(first, tmp_path / "w.safetensors")
    c.model.image_size, c.model.patch_size, c.model.width = (32, 48), None, None
    c.distill.kind, c.init.weights = "none", str(tmp_path / "w.safetensors")
    experiment = resolved(c, open_dataset(c.data))
    with caplog.at_level("INFO", logger="deit_jax"):
        variables = starting_weights(experiment, tmp_path / "run", [str(i) for i in range(10)])
    assert "first layer adapted from 3 to 5 channels" in caplog.text
    assert "position embedding resized from 2x2 to 2x3" in caplog.text
    shapes = jax.tree.map(lambda x: x.shape, experiment.abstract_state.params)
    assert jax.tree.map(lambda x: x.shape, variables["params"]) == shapes
    old = first.variables["params"]["patch_embed"]["proj"]
    kernel = variables["params"]["patch_embed"]["proj"]["kernel"]
    np.testing.assert_allclose(kernel[:, :, 3], old["kernel"][:, :, 0] * 0.6, rtol=1e-6)
    np.testing.assert_array_equal(variables["params"]["patch_embed"]["proj"]["bias"], old["bias"])


def test_the_benchmark_and_a_dumped_step_have_the_channels(run, tmp_path):
    workdir, c, _ = run
    result = measured(c, 0.05)
    assert result["images_per_second"] > 0
    experiment, dataset = prepare(c, workdir)
    assert step_dump.dump_step(experiment, dataset, workdir, 1)
    with np.load(workdir / "replay" / "step_1" / "batch.npz") as arrays:
        assert arrays["image"].shape == (16, 12, 16, 5)
        assert arrays["model_input"].shape == (16, 12, 16, 5)
    rates = input_rate.measure(experiment, dataset, 0.3)
    assert rates["images_per_second"] > 0


def test_estimates_know_the_channels():
    three, five = resolved_many(3), resolved_many(5)
    patches, pixels = 16, 4 * 4
    more = flops.forward_flops(five.model, 16) - flops.forward_flops(three.model, 16)
    assert more == 2 * patches * pixels * 2 * 24  # multiply-accumulates of two more channels
    share = five.load.share * 16 * 16 * memory.PIXEL_BYTES
    grown = five.load.held - three.load.held
    kernel = five.load.state_bytes - three.load.state_bytes
    assert grown == 2 * share + kernel
    _, (_, _, batch) = plan.lower_step(five)
    assert batch["image"].shape == (32, 16, 16, 5)


def resolved_many(channels):
    c = many(channels)
    return resolved(c, open_dataset(c.data))
