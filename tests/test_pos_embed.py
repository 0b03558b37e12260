"""Position embeddings are resized as PyTorch resizes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.models.pos_embed import resize_pos_embed


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (14, 12)])
def test_resizing_is_torchs_bicubic_and_keeps_the_prefix(torch, old, new, prefix):
    rng = np.random.default_rng(old + prefix)
    pos_embed = rng.normal(size=(1, prefix + old * old, 8)).astype(np.float32)
    resize = jax.jit(resize_pos_embed, static_argnums=(1, 2))
    resized = np.asarray(resize(jnp.array(pos_embed), prefix, new))
    # facebookresearch/deit, main.py lines 296-306
    patches = torch.from_numpy(pos_embed[:, prefix:]).reshape(1, old, old, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        patches, size=(new, new), mode="bicubic", align_corners=False
    )
    expected = expected.permute(0, 2, 3, 1).flatten(1, 2).numpy()
    np.testing.assert_array_equal(resized[:, :prefix], pos_embed[:, :prefix])
    np.testing.assert_allclose(resized[:, prefix:], expected, atol=1e-5)


def test_the_same_grid_is_left_alone():
    pos_embed = np.random.default_rng(0).normal(size=(1, 2 + 49, 4)).astype(np.float32)
    np.testing.assert_allclose(resize_pos_embed(jnp.array(pos_embed), 2, 7), pos_embed, atol=1e-6)


def test_positions_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="50 tokens is not 2 and a square grid"):
        resize_pos_embed(jnp.zeros((1, 50, 4)), 2, 7)
