"""Models without a head, and features of layers, against timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deit_jax
from deit_jax.weights.torch_names import from_torch


def nhwc(images):
    return jnp.asarray(images.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "regnety_002", "efficientnet_lite0"]
)
def test_a_model_without_classes_gives_what_its_heads_are_given(name, torch, timm):
    theirs = timm.create_model(name.replace("efficient", "tf_efficient"), num_classes=0).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images).numpy()
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    model = deit_jax.create_model(name, num_classes=0)
    heads = jax.jit(model.apply)(from_torch(state, name, num_classes=0), nhwc(images))
    assert (heads.dist is not None) == ("distilled" in name)
    np.testing.assert_allclose(heads.fused(), expected, atol=1e-4)
