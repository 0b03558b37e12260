"""Weights for patches of one size in a model of another, and other channels."""

import jax
import numpy as np
import pytest

from deit_jax.errors import UserError
from deit_jax.weights.exporters import run
from deit_jax.weights.first_layer import adapt_channels, resample_patches
from deit_jax.weights.load import load_variables
from tests.test_any_weights import TINY, config_of, saved
from tests.test_convert import DISTILLED, PLAIN, logits, opened

PATCHES = [(16, 8), (16, 14), (8, 16), (14, 16), (16, 32), (4, 6), (16, 7)]


def kernel_of(patch, channels=3):
    return np.random.default_rng(patch).normal(size=(patch, patch, channels, 5)).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), PATCHES)
def test_resampled_patches_are_timms(old, new, timm, torch):
    from timm.layers import resample_patch_embed

    kernel = kernel_of(old)
    theirs = resample_patch_embed(
        torch.from_numpy(kernel.transpose(3, 2, 0, 1)).double(), [new, new]
    )
    ours = resample_patches(kernel, new)
    scale = np.abs(ours).max()
    np.testing.assert_allclose(
        ours / scale, theirs.numpy().transpose(2, 3, 1, 0) / scale, atol=2e-4
    )


@pytest.mark.parametrize(("old", "new"), [(8, 16), (6, 9), (4, 5)])
def test_resized_patches_give_the_same_tokens(old, new, torch):
    """FlexiViT section 3.4: <resized x, resampled w> = <x, w> for every x where patches grow."""
    kernel = kernel_of(old)
    x = np.random.default_rng(0).normal(size=(7, 3, old, old)).astype(np.float32)
    larger = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=(new, new), mode="bicubic", antialias=True
    )
    before = np.einsum("bcpq,pqcd->bd", x, kernel)
    after = np.einsum("bcpq,pqcd->bd", larger.numpy(), resample_patches(kernel, new))
    np.testing.assert_allclose(after, before, atol=2e-3)


@pytest.mark.parametrize(("old", "new"), [(16, 8), (8, 12)])
def test_resampling_is_the_formula(old, new, torch):
    """(B^T)^+ w, with B written out pixel by pixel."""
    basis = torch.eye(old * old).reshape(old * old, 1, old, old)
    resized = torch.nn.functional.interpolate(
        basis, size=(new, new), mode="bicubic", antialias=True
    )
    matrix = resized.reshape(old * old, new * new).numpy().T.astype(np.float64)
    kernel = kernel_of(old)
    expected = np.linalg.pinv(matrix.T, rcond=1e-6) @ kernel.reshape(old * old, -1)
    ours = resample_patches(kernel, new).reshape(new * new, -1)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", [PLAIN, DISTILLED, "deit3_small_patch16_224"])
def test_a_run_starts_with_other_patches(name, tmp_path):
    first = opened(name, TINY | {"image_size": 64})
    run.write(first, tmp_path / "run")
    shape = TINY | {"patch_size": 8, "image_size": (48, 32)}
    loaded = load_variables(tmp_path / "run", config_of(shape, name), 3)
    assert loaded.notes == (
        "first layer resampled from patches of 16 to 8 pixels",
        "position embedding resized from 4x4 to 6x4",
    )
    params, before = loaded.variables["params"], first.variables["params"]
    np.testing.assert_allclose(
        params["patch_embed"]["proj"]["kernel"],
        resample_patches(before["patch_embed"]["proj"]["kernel"], 8),
    )
    np.testing.assert_array_equal(
        params["patch_embed"]["proj"]["bias"], before["patch_embed"]["proj"]["bias"]
    )
    images = np.zeros((1, 48, 32, 3), np.float32)
    jax.jit(loaded.model.apply)(loaded.variables, images)


@pytest.mark.parametrize("patch", [8, 14, 32])
def test_files_start_with_other_patches(patch, tmp_path, torch):
    from deit_jax.weights.torch_names import to_torch

    first = opened(PLAIN, TINY | {"image_size": 64})
    path = saved(tmp_path, torch, {"model": to_torch(first.variables)})
    shape = TINY | {"patch_size": patch, "image_size": 4 * patch}
    loaded = load_variables(path, config_of(shape), 3)
    assert loaded.notes == (f"first layer resampled from patches of 16 to {patch} pixels",)
    np.testing.assert_array_equal(
        loaded.variables["params"]["pos_embed"], first.variables["params"]["pos_embed"]
    )
    logits(loaded.model, loaded.variables, 4 * patch)


def test_channels_are_summed_for_grey_and_else_adapted_as_timm_does(timm, torch):
    from timm.models._manipulate import adapt_input_conv

    for have, want in ((3, 1), (3, 2), (3, 4), (3, 7), (3, 3)):
        kernel = kernel_of(4, have)
        theirs = adapt_input_conv(want, torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
        np.testing.assert_allclose(
            adapt_channels(kernel, want), theirs.numpy().transpose(2, 3, 1, 0), rtol=1e-6
        )
    four = kernel_of(4, 4)
    np.testing.assert_allclose(adapt_channels(four, 1)[:, :, 0], four.sum(axis=2), rtol=1e-6)
    with pytest.raises(ValueError, match="reads 4 channels, the model's 3, and only weights of 3"):
        adapt_channels(four, 3)


def test_a_name_is_no_wish_for_other_patches(tmp_path, torch):
    from deit_jax.weights.torch_names import to_torch

    first = opened("deit_tiny_patch16_224", {"image_size": 32})
    path = saved(tmp_path, torch, to_torch(first.variables))
    with pytest.raises(UserError, match="weights do not fit"):
        load_variables(path, "deit3_huge_patch14_224")
