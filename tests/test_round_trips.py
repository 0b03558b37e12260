"""timm and transformers know our models' classes, crop and way of resizing, and we theirs."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from deit_jax.data.decode import Reading
from deit_jax.data.preprocess import preprocess
from deit_jax.errors import UserError
from deit_jax.models import registry
from deit_jax.shapes import sides
from deit_jax.weights import convert
from deit_jax.weights.exporters import timm as timm_lib
from deit_jax.weights.load import open_model
from deit_jax.weights.metadata import read_metadata
from deit_jax.weights.processors import of_processor
from tests.test_convert import DISTILLED, FAMILIES, PLAIN, SMALL, logits, opened
from tests.timm_reference import import_timm, import_transformers

DEIT3 = "deit3_small_patch16_224"
PHOTOGRAPH = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
).resize((300, 200))
MEAN = (0.1, 0.2, 0.3)
FILL = tuple(round(255 * x) for x in MEAN)
READINGS = [Reading("crop"), Reading("squash"), Reading("pad", fill=FILL)]


@pytest.fixture(scope="module")
def timm():
    return import_timm()


def answers(model, images):
    import torch

    with torch.no_grad():
        said = model.eval()(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    return getattr(said, "logits", said).numpy()


@pytest.mark.parametrize("index", [1, 2, 4])
def test_timm_loads_a_folder_by_itself(index, tmp_path, timm):
    """What a name, classes, shapes and weights are: nothing is said to create_model."""
    name, overrides = FAMILIES[index]
    first = opened(name, overrides)
    assert convert.convert(first, tmp_path / "m", "timm_folder") == "timm_folder"
    model = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]
    images, heads = logits(first.model, first.variables, first.image_size)
    np.testing.assert_allclose(answers(model, images), heads.fused(), atol=2e-4, rtol=1e-4)


def test_timm_knows_every_name_that_is_written(timm):
    first = opened(PLAIN, SMALL)
    for name in registry.list_models():
        of_name = dataclasses.replace(first, name=name, model=registry.create_model(name))
        written, _ = timm_lib.as_called(of_name)
        assert timm.is_model(written), name


def test_a_size_that_timm_has_no_name_for_is_an_argument(tmp_path, timm):
    first = opened("deit3_medium_patch16_384", {"depth": 1})
    convert.convert(first, tmp_path / "m", "timm_folder")
    convert.convert(first, tmp_path / "w.safetensors")
    called = timm_lib.call(first, tmp_path / "w.safetensors")
    assert "('deit3_medium_patch16_224'," in called
    assert "img_size=384" in called
    model = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    images, heads = logits(first.model, first.variables, 384)
    np.testing.assert_allclose(answers(model, images), heads.fused(), atol=2e-4, rtol=1e-4)
    again = eval(called, {"timm": timm})  # what is printed for people to copy
    np.testing.assert_allclose(answers(again, images), heads.fused(), atol=2e-4, rtol=1e-4)
    assert open_model(tmp_path / "m").model == first.model


@pytest.mark.parametrize("reading", READINGS, ids=lambda r: r.resize)
@pytest.mark.parametrize("size", [32, (32, 48)])
def test_timm_prepares_images_as_we_do(reading, size, tmp_path, timm):
    overrides = SMALL | {"image_size": size}
    first = dataclasses.replace(opened(PLAIN, overrides), reading=reading, crop_ratio=0.8)
    convert.convert(first, tmp_path / "m", "timm_folder")
    model = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    theirs = transform(PHOTOGRAPH).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(theirs, preprocess(PHOTOGRAPH, first.spec)[0], atol=1e-5)
    back = open_model(tmp_path / "m")
    assert back.view == dataclasses.replace(first, crop_ratio=back.crop_ratio).view
    assert back.crop_ratio == (0.8 if reading.resize == "crop" else 1.0)


TIMMS = [
    (PLAIN, {"img_size": 64, "depth": 2}, 64),
    (DISTILLED, {"img_size": (32, 64), "depth": 2, "pos_drop_rate": 0.1}, (32, 64)),
    (DEIT3, {"img_size": 64, "depth": 2, "no_embed_class": False, "drop_path_rate": 0.1}, 64),
    (DEIT3, {"img_size": (64, 32), "depth": 2, "class_token": True, "qkv_bias": True}, (64, 32)),
    ("vit_tiny_patch16_224", {"depth": 1, "dynamic_img_size": True, "weight_init": ""}, 224),
    ("vit_tiny_patch16_224", {"depth": 1, "img_size": 64, "in_chans": 1}, 64),
    ("regnety_002", {"drop_path_rate": 0.1}, 224),
    ("tf_efficientnet_lite0", {}, 224),
]


@pytest.mark.parametrize(("name", "told", "size"), TIMMS)
def test_what_timm_saves_is_read_as_it_is(name, told, size, tmp_path, timm):
    """Nothing in the folder is changed: timm writes all of its arguments by itself."""
    model = timm.create_model(name, num_classes=3, **told)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    said = json.loads((tmp_path / "config.json").read_text())
    assert {"num_classes", "in_chans", "global_pool"} <= said["model_args"].keys()
    found = open_model(tmp_path)
    assert (found.name, found.image_size) == (name.removeprefix("tf_"), size)
    assert found.mean == tuple(said["pretrained_cfg"]["mean"])
    if name == DEIT3:
        assert found.model.class_position == ("no_embed_class" in told)
    shape = (2, *sides(size), told.get("in_chans", 3))
    images = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    heads = jax.jit(found.model.apply)(found.variables, images)
    np.testing.assert_allclose(answers(model, images), heads.fused(), atol=2e-4, rtol=1e-4)


def test_timms_own_folders_are_read_as_timm_means_them(tmp_path, timm):
    model = timm.create_model("deit_tiny_patch16_224", num_classes=3, img_size=64, depth=2)
    names = ["wolf", "fox", "dog"]
    told = {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"}
    model.pretrained_cfg |= told
    timm.models.save_for_hf(
        model, tmp_path, model_config={"label_names": names}, safe_serialization=True
    )
    found = open_model(tmp_path)
    assert found.classes == names
    assert (found.image_size, found.reading.resize) == (64, "squash")
    assert any("interpolation bilinear in config.json" in note for note in found.notes)


@pytest.mark.parametrize("form", ["flat", "flat label_names", "nested"])
def test_older_forms_of_timms_folders_say_the_same_to_timm_and_here(form, tmp_path, timm):
    """Without pretrained_cfg its fields stand in config.json itself, names as `labels`."""
    names, inputs = ["wolf", "fox", "dog"], {"mean": list(MEAN), "std": [0.4, 0.5, 0.6]}
    inputs |= {"crop_pct": 0.8, "crop_mode": "center", "num_classes": 3, "num_features": 192}
    inputs |= {"input_size": [3, 224, 224], "interpolation": "bicubic"}
    described = {"architecture": "vit_tiny_patch16_224"}
    key = "labels" if form == "flat" else "label_names"
    inputs[key] = names
    if form == "nested":
        del inputs["num_features"]
        described["pretrained_cfg"] = inputs
    else:
        described |= inputs
    whole = opened("vit_tiny_patch16_224", {})
    convert.convert(whole, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps(described))
    model = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == names
    found = open_model(tmp_path / "m")
    assert (found.name, found.classes, found.crop_ratio) == (whole.name, names, 0.8)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    theirs = transform(PHOTOGRAPH).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(theirs, preprocess(PHOTOGRAPH, found.spec)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        (PLAIN, "act_layer", "quick_gelu", "in config.json; deit_jax has only gelu"),
        (PLAIN, "global_pool", "avg", "deit_jax has only token"),
        (PLAIN, "reg_tokens", 4, "deit_jax has only 0"),
        (PLAIN, "qkv_bias", None, "deit_jax has only True"),
        (PLAIN, "swiglu", True, "in config.json is not known to deit_jax"),
        ("regnety_002", "global_pool", "max", "deit_jax has only avg"),
        ("regnety_002", "img_size", 64, "in config.json is not known to deit_jax"),
    ],
)
def test_what_no_model_here_does_is_refused_in_timms_folders(name, key, value, said, tmp_path):
    described = {"architecture": name, "model_args": {key: value}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=rf"^model_args\.{key}.*{said}$"):
        read_metadata(tmp_path)


def test_timms_other_lite_networks_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "efficientnet_lite0.ra_in1k"}')
    with pytest.raises(ValueError, match=r"efficientnet_lite0 in config\.json pads images as PyT"):
        read_metadata(tmp_path)


def test_transformers_reads_the_folder_that_timm_reads(tmp_path):
    transformers = import_transformers()
    first = dataclasses.replace(opened(DISTILLED, SMALL), multi_label=True)
    convert.convert(first, tmp_path / "m", "timm_folder")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    assert type(model).__name__ == "TimmWrapperForImageClassification"
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert model.config.problem_type == "multi_label_classification"
    images, heads = logits(first.model, first.variables)
    np.testing.assert_allclose(answers(model, images), heads.fused(), atol=1e-4)
    assert open_model(tmp_path / "m").multi_label


def test_deit_iii_is_a_beit_to_transformers(tmp_path):
    transformers = import_transformers()
    first = opened(DEIT3, SMALL)
    convert.convert(first, tmp_path / "m")
    model, info = transformers.BeitForImageClassification.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    images, heads = logits(first.model, first.variables)
    np.testing.assert_allclose(answers(model, images), heads.fused(), atol=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    back = open_model(tmp_path / "theirs")
    assert (back.name, back.model, back.classes) == (first.name, first.model, first.classes)
    np.testing.assert_allclose(logits(back.model, back.variables)[1].cls, heads.cls, atol=1e-4)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["use_relative_position_bias"] = True  # a BEiT of its own kind
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"'beit' in config\.json is not deit or vit, nor a DeiT III"
    ):
        open_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(PLAIN, "ViTForImageClassification"), (DISTILLED, "DeiTForImageClassificationWithTeacher")],
)
def test_a_class_token_without_a_position_has_one_of_zeros_in_transformers(name, kind, tmp_path):
    transformers = import_transformers()
    first = opened(name, SMALL | {"class_position": False})
    convert.convert(first, tmp_path / "m")
    model, info = getattr(transformers, kind).from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, heads = logits(first.model, first.variables)
    np.testing.assert_allclose(answers(model, images), heads.fused(), atol=1e-4)
    back = open_model(tmp_path / "m")
    np.testing.assert_allclose(
        logits(back.model, back.variables)[1].fused(), heads.fused(), atol=1e-5
    )


@pytest.mark.parametrize("size", [32, (32, 64)])
@pytest.mark.parametrize("position", [True, False])
def test_layer_scale_keeps_a_class_position_and_the_lack_of_one(position, size, tmp_path):
    transformers = import_transformers()
    fields = {"layer_scale": 1e-4, "class_position": position, "image_size": size}
    first = opened(DEIT3, SMALL | fields)
    convert.convert(first, tmp_path / "m")
    if size == 32:  # BEiT takes squares alone
        model, info = transformers.BeitForImageClassification.from_pretrained(
            tmp_path / "m", output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        images, heads = logits(first.model, first.variables)
        np.testing.assert_allclose(answers(model, images), heads.fused(), atol=1e-4)
    back = open_model(tmp_path / "m")
    assert back.model == first.model
    images = np.random.default_rng(1).normal(size=(1, *sides(size), 3)).astype(np.float32)
    ours, theirs = (jax.jit(m.model.apply)(m.variables, images).cls for m in (first, back))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_what_transformers_squashes_is_squashed_here_and_back(tmp_path):
    """ViT's own processor crops nothing: the whole image becomes a square."""
    transformers = import_transformers()
    convert.convert(opened(PLAIN, SMALL), tmp_path / "m")
    own = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, resample=3, image_mean=list(MEAN), image_std=[0.5] * 3
    )
    own.save_pretrained(tmp_path / "m")
    found = open_model(tmp_path / "m")
    assert found.reading.resize == "squash"
    convert.convert(found, tmp_path / "again")
    for folder in ("m", "again"):
        processor = transformers.AutoImageProcessor.from_pretrained(
            tmp_path / folder, backend="pil"
        )
        theirs = processor(PHOTOGRAPH, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(theirs, preprocess(PHOTOGRAPH, found.spec)[0], atol=1e-5)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "m")
    notes = open_model(tmp_path / "m").notes
    assert any("resample 2 (bilinear) in preprocessor_config.json" in note for note in notes)


# Of a kind of model, what preprocessor_config.json says, and the beginnings of the notes on it.
SQUASHED = "preprocessor_config.json has images squashed to 256x256 before the crop; here they"
PROCESSORS = [
    ("vit", {"image_processor_type": "ViTImageProcessor", "resample": 3}, []),
    ("vit", {"image_processor_type": "ViTImageProcessorFast", "resample": 3}, []),
    ("vit", {"size": 224, "resample": 3}, []),
    ("vit", {"size": [224, 224], "resample": 3, "do_center_crop": None, "crop_size": None}, []),
    (
        "vit",
        {"feature_extractor_type": "ViTFeatureExtractor", "do_normalize": False, "resample": 3},
        [],
    ),
    ("vit", {"do_rescale": False, "resample": 3}, []),
    ("vit", {"do_rescale": False, "do_normalize": False, "resample": 3}, []),
    ("vit", {"rescale_factor": 1 / 127.5, "image_mean": list(MEAN), "resample": 3}, []),
    ("vit", {"image_processor_type": "BitImageProcessor"}, []),
    ("vit", {"image_processor_type": "BitImageProcessor", "size": 236}, []),
    ("vit", {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}, []),
    ("vit", {"image_processor_type": "DeiTImageProcessor"}, [SQUASHED]),
    ("deit", {}, [SQUASHED]),
    ("deit", {"size": 256, "crop_size": 224, "image_mean": list(MEAN)}, [SQUASHED]),
    ("deit", {"do_center_crop": False, "size": {"height": 224, "width": 224}}, []),
    ("beit", {}, []),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder for transformers of each kind of model, without its processor's file."""
    made = {}
    for kind, name in (("vit", PLAIN), ("deit", DISTILLED), ("beit", DEIT3)):
        made[kind] = tmp_path_factory.mktemp(kind) / "m"
        convert.convert(opened(name, {"depth": 1}), made[kind])
        (made[kind] / "preprocessor_config.json").unlink()
    return made


@pytest.mark.parametrize(("kind", "told", "notes"), PROCESSORS)
def test_what_a_processor_leaves_out_its_type_decides(kind, told, notes, folders):
    transformers = import_transformers()
    (folders[kind] / "preprocessor_config.json").write_text(json.dumps(told))
    found = open_model(folders[kind])
    assert [note[: len(SQUASHED)] for note in found.notes] == notes
    processor = transformers.AutoImageProcessor.from_pretrained(folders[kind], backend="pil")
    image = PHOTOGRAPH.resize((300, 300)) if notes else PHOTOGRAPH
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = preprocess(image, found.spec)[0]
    assert ours.shape == (224, 224, 3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, r"resample 2 \(bilinear\) in prep"),
        ({"do_resize": False, "resample": 3}, r"do_resize false in .*; images are resized here"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "resample": 3},
            r"ConvNextImageProcessor in .* is not known here: read as ViTImageProcessor",
        ),
        (None, r"no preprocessor_config\.json: mean \(0\.485, .* and std .* of images assumed"),
    ],
)
def test_what_is_done_otherwise_than_by_a_processor_is_said(told, said, folders):
    file = folders["vit"] / "preprocessor_config.json"
    file.unlink(missing_ok=True)
    if told is not None:
        file.write_text(json.dumps(told))
    (note,) = open_model(folders["vit"]).notes
    assert re.match(said, note)


@pytest.mark.parametrize(
    "told",
    [
        {"size": {"longest_edge": 224}},
        {"size": "large"},
        {"do_rescale": "no"},
        {"rescale_factor": 0},
        {"image_mean": ["a"]},
        {"image_std": None},
        {"resample": 9},
    ],
)
def test_a_processor_that_is_not_understood_is_refused_by_key(told, folders):
    (folders["vit"] / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=rf"{next(iter(told))}=.* in what it says of itself"):
        open_model(folders["vit"])


def test_no_crop_loses_a_pixel_of_the_resized_side():
    """The side that images are resized to is the crop's, divided and without its fraction."""
    for crop in (32, 64, 192, 224, 256, 384):
        for side in range(crop, 3 * crop):
            told = {"size": side, "crop_size": crop, "do_center_crop": True}
            assert int(crop / of_processor(told, "deit")["crop_ratio"]) == side
