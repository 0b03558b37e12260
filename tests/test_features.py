"""Models without a head, and features of layers, against timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deit_jax
from deit_jax.analysis.choices import FEATURES
from deit_jax.analysis.features import embedder
from deit_jax.errors import UserError
from deit_jax.weights.torch_names import from_torch
from tests.timm_reference import import_timm, import_torch


def no_grad():
    return import_torch().no_grad()


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


@pytest.fixture(scope="module")
def twins():
    """Return timm's distilled tiny transformer and ours with its weights, and images for both."""
    timm, torch = import_timm(), import_torch()
    torch.manual_seed(0)
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=4).eval()
    torch.nn.init.normal_(theirs.norm.weight, 1, 0.3)  # or the norm would hardly show
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    name, overrides = "deit_tiny_distilled_patch16_224", {"image_size": 64, "depth": 4}
    model = deit_jax.create_model(name, **overrides)
    variables = jax.tree.map(jnp.asarray, from_torch(state, name, **overrides))
    return theirs, model, variables, torch.randn(3, 3, 64, 64)


@pytest.mark.parametrize("norm", [False, True])
def test_features_are_timms_intermediates(twins, norm):
    theirs, model, variables, images = twins
    with no_grad():
        expected = theirs.forward_intermediates(
            images, norm=norm, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    tokens = deit_jax.features(model, variables["params"], nhwc(images), norm=norm)
    assert len(tokens) == 4
    for ours, (patches, prefix) in zip(tokens, expected, strict=True):
        np.testing.assert_allclose(ours[:, 2:], patches.numpy(), atol=1e-4)
        np.testing.assert_allclose(ours[:, :2], prefix.numpy(), atol=1e-4)
    (second,) = deit_jax.features(model, variables["params"], nhwc(images), [1], norm)
    last = deit_jax.features(model, variables["params"], nhwc(images), -1, norm)
    np.testing.assert_array_equal(second, tokens[1])
    np.testing.assert_array_equal(last, tokens[3])


def test_every_kind_of_embedding(twins):
    theirs, model, variables, images = twins
    with no_grad():
        tokens = theirs.forward_features(images).numpy()  # normed
        pooled = theirs.forward_head(theirs.forward_features(images), pre_logits=True).numpy()
    expected = {
        "pooled": pooled,
        "cls": tokens[:, 0],
        "dist": tokens[:, 1],
        "mean": tokens[:, 2:].mean(1),
        "patches": tokens[:, 2:],
        "tokens": tokens,
    }
    assert expected.keys() == FEATURES.keys()
    for kind, values in expected.items():
        ours = jax.jit(embedder(model, kind))(variables, nhwc(images))
        np.testing.assert_allclose(ours, values, atol=1e-4, err_msg=kind)


def test_features_that_there_are_not(twins):
    _, model, variables, images = twins
    with pytest.raises(UserError, match=r"layer 4: the model has 4 blocks; choose 0 … 3, or -1"):
        deit_jax.features(model, variables["params"], nhwc(images), 4)
    with pytest.raises(UserError, match=r"layer -5"):
        embedder(model, "cls", -5)
    with pytest.raises(UserError, match="no distillation token; take --features=cls"):
        embedder(model.clone(distilled=False), "dist")
    convnet = deit_jax.create_model("regnety_002")
    with pytest.raises(UserError, match="a RegNetY has no tokens; what its head is given"):
        deit_jax.features(convnet, {}, nhwc(images))
    for kind, layer in (("cls", -1), ("pooled", 3)):
        with pytest.raises(UserError, match="take --features=pooled of its last layer"):
            embedder(convnet, kind, layer)
