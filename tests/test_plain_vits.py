"""timm's plain ViTs by their names: the same tensors, input and logits; DeiTs stay DeiTs."""

import json

import jax
import numpy as np
import pytest

import deit_jax
from deit_jax.models import registry
from deit_jax.models.registry import create_model, get_spec
from deit_jax.weights import torch_names
from deit_jax.weights.load import load_variables, open_model
from deit_jax.weights.torch_names import from_torch, to_torch
from tests.test_any_weights import saved
from tests.test_convert import logits, opened
from tests.test_open_weights import tensors_of

NAMES = registry.list_models("vit_*")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_input_are_timms(name, timm, torch):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000)
    ours = {key: value.shape for key, value in tensors_of(name).items()}
    assert ours == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert theirs.blocks[0].attn.num_heads == create_model(name).num_heads
    assert theirs.norm.eps == 1e-6
    spec, cfg = get_spec(name), theirs.default_cfg
    assert (3, spec.image_size, spec.image_size) == tuple(cfg["input_size"])
    assert (spec.mean, spec.std, spec.crop_ratio) == (cfg["mean"], cfg["std"], cfg["crop_pct"])
    assert (cfg["interpolation"], cfg["crop_mode"]) == ("bicubic", "center")


def test_all_that_timm_has_of_this_kind_is_registered(timm):
    pattern = [
        f"vit_{s}_patch*_{r}" for s in ("tiny", "small", "base", "large") for r in (224, 384)
    ]
    theirs = {name for p in pattern for name in timm.list_models(p)}
    plain = {n for n in theirs if n.count("_") == 3 and n.split("_")[2][5:].isdecimal()}
    assert plain == set(NAMES)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch32_384"])
def test_logits_are_timms(name, timm, torch):
    size = 64
    theirs = timm.create_model(name, img_size=size, num_classes=5, depth=2).eval()
    flat = {key: value.numpy() for key, value in theirs.state_dict().items()}
    variables = from_torch(flat, name, image_size=size, depth=2)
    model = create_model(name, num_classes=5, image_size=size, depth=2)
    images, heads = logits(model, variables, size)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(heads.cls, expected, atol=2e-5)


def test_files_that_do_not_say_are_still_deits():
    for name in [*registry.list_models("deit_small*"), "deit_base_patch16_384"]:
        assert torch_names.candidates(tensors_of(name)) == [name]
    resized = tensors_of("deit_small_patch16_224")  # as timm's vit_small_patch16_384
    resized["pos_embed"] = np.broadcast_to(np.float32(0), (1, 577, 384))
    assert torch_names.candidates(resized) == ["deit_small_patch16_224"]
    for name in ("vit_large_patch16_384", "vit_base_patch32_224", "vit_small_patch8_224"):
        assert torch_names.candidates(tensors_of(name)) == [name]


def test_the_convention_is_said_and_can_be_said(tmp_path, torch):
    name, other = "deit_tiny_patch16_224", "vit_tiny_patch16_224"
    flat = to_torch(opened(name, {"image_size": 32}).variables)
    path = saved(tmp_path, torch, flat)
    assumed = open_model(path)
    assert (assumed.name, assumed.mean) == (name, (0.485, 0.456, 0.406))
    assert any(f"--model={other} takes (0.5, 0.5, 0.5)" in note for note in assumed.notes)
    said = open_model(path, other)
    assert (said.name, said.mean, said.std) == (other, (0.5,) * 3, (0.5,) * 3)
    assert (said.crop_ratio, said.notes) == (0.9, ())
    assert deit_jax.load(other, str(path), image_size=48)[0].image_size == 48


def test_timms_folders_say_it_themselves(tmp_path):
    from safetensors.numpy import save_file

    name = "vit_tiny_patch16_224"
    save_file(to_torch(opened(name, {"image_size": 32}).variables), tmp_path / "model.safetensors")
    described = {"architecture": name, "pretrained_cfg": {"tag": "augreg_in21k_ft_in1k"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    loaded = open_model(tmp_path)
    assert (loaded.name, loaded.mean, loaded.notes) == (name, (0.5,) * 3, ())


@pytest.mark.parametrize("size", [32, 48, (32, 64)])
def test_deit3_takes_any_size(size, tmp_path, torch, timm):
    """Its positions leave the class token out; timm's resizing of them without antialias agrees."""
    name = "deit3_small_patch16_224"
    theirs = timm.create_model(name, img_size=80, num_classes=3, depth=2).eval()
    path = tmp_path / "w.pth"
    torch.save({"model": theirs.state_dict()}, path)
    loaded = load_variables(path, open_config(name), 3, image_size=size)
    assert any("position embedding resized from 5x5 to" in note for note in loaded.notes)
    target = timm.create_model(name, img_size=size, num_classes=3, depth=2).eval()
    state = theirs.state_dict()
    from timm.layers import resample_abs_pos_embed

    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], target.patch_embed.grid_size, num_prefix_tokens=0, antialias=False
    )
    target.load_state_dict(state)
    sides = (size, size) if isinstance(size, int) else size
    images = np.random.default_rng(0).normal(size=(2, *sides, 3)).astype(np.float32)
    with torch.no_grad():
        expected = target(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    heads = jax.jit(loaded.model.apply)(loaded.variables, images)
    np.testing.assert_allclose(heads.cls, expected, atol=2e-5)


def open_config(name):
    from deit_jax.configs import base

    c = base.get_model_config(name)
    c.depth = 2
    return c
