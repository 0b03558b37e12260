"""Attention maps and token features against timm's own; the rest against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import deit_jax
from deit_jax.analysis import attention
from deit_jax.weights import torch_names

SIZE = 32


def small(**overrides):
    fields = {"image_size": SIZE, "patch_size": 8, "width": 48, "depth": 3, "num_heads": 3}
    name = "deit_tiny_distilled_patch16_224"
    return deit_jax.create_model(name, num_classes=7, **(fields | overrides))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)), jnp.float32)


@pytest.fixture(scope="module")
def trained(images):
    """Return a model and weights large enough that attention is not even."""
    model = small()
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    return model, jax.tree.map(lambda x: 8 * x, params)


def timm_twin(timm, torch, params):
    """Return timm's model with the same weights, attention written out."""
    twin = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=7,
        img_size=SIZE,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
    ).eval()
    flat = torch_names.to_torch({"params": params})
    twin.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in flat.items()})
    for block in twin.blocks:
        block.attn.fused_attn = False
    return twin


def test_maps_and_tokens_are_timms(timm, torch, trained, images):
    model, params = trained
    twin, maps, tokens, last = timm_twin(timm, torch, params), [], [], []
    for block in twin.blocks:
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: maps.append(out))
        block.register_forward_pre_hook(lambda _, args: tokens.append(args[0][:, :2]))
        block.register_forward_hook(lambda _, args, out: last.append(out[:, :2]))
    with torch.no_grad():
        twin(torch.tensor(np.asarray(images).transpose(0, 3, 1, 2)))
    ours = attention.attention_maps(model, params, images)
    np.testing.assert_allclose(ours, np.stack([m.numpy() for m in maps], 1), atol=2e-4)
    assert float(ours.max()) > 0.5  # and not 1 / N everywhere
    features = attention.token_features(model, params, images)
    theirs = np.stack([t.numpy() for t in (*tokens, last[-1])], 1)
    np.testing.assert_allclose(features, theirs, atol=2e-3, rtol=1e-3)


def test_token_features_of_every_kind_of_model(images):
    for overrides in ({}, {"distilled": False}, {"class_position": False}):
        model = small(**overrides)
        params = jax.jit(model.init)(jax.random.key(0), images)["params"]
        features = attention.token_features(model, params, images)
        tokens = 1 + (overrides != {"distilled": False})
        assert features.shape == (2, 4, tokens, 48)
        entering = []

        def look(call, args, kwargs, context, entering=entering):
            if context.module.name == "blocks_0":
                entering.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(look):
            model.apply({"params": params}, images)
        np.testing.assert_allclose(features[:, 0], entering[0][:, :tokens], atol=1e-6)


def test_rollout_is_its_formula():
    rng = np.random.default_rng(0)
    maps = rng.random((2, 3, 4, 5, 5))
    maps /= maps.sum(-1, keepdims=True)
    expected = []
    for image in maps:
        product = np.eye(5)
        for layer in image:
            product = (layer.mean(0) + np.eye(5)) / 2 @ product
        expected.append(product)
    found = attention.rollout(jnp.asarray(maps, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


def test_cosines(trained):
    features = np.zeros((2, 2, 2, 3), np.float32)
    features[:, 0] = [[1, 0, 0], [0, 2, 0]]  # at a right angle
    features[:, 1] = [[1, 1, 0], [3, 3, 0]]  # the same direction
    np.testing.assert_allclose(attention.token_cosines(jnp.asarray(features)), [0, 1], atol=1e-6)
    params = {"cls_token": np.array([[[3.0, 4.0]]]), "dist_token": np.array([[[4.0, 3.0]]])}
    assert attention.learned_cosine(params) == pytest.approx(24 / 25)


def test_disagreement():
    found = attention.disagreement(
        {"a": np.array([1, 2, 3, 4]), "b": np.array([1, 2, 0, 0]), "c": np.array([1, 2, 3, 4])}
    )
    np.testing.assert_array_equal(found, [[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]])


def test_positions_and_filters(trained):
    model, params = trained
    similarity = attention.position_similarity(model, params)
    positions = np.asarray(params["pos_embed"])[0, 2:]
    assert similarity.shape == (16, 16)
    expected = positions[3] @ positions[9]
    expected /= np.linalg.norm(positions[3]) * np.linalg.norm(positions[9])
    assert similarity[3, 9] == pytest.approx(expected, abs=1e-5)
    # Filters that are multiples of one pattern have it as their first component.
    pattern = np.random.default_rng(0).random((4, 4, 3))
    kernel = pattern[..., None] * np.linspace(-1, 1, 10)
    first = attention.patch_filters({"patch_embed": {"proj": {"kernel": kernel}}}, 2)[0]
    scaled = (pattern - pattern.min()) / (pattern.max() - pattern.min())
    assert min(np.abs(first - scaled).max(), np.abs(1 - first - scaled).max()) < 1e-6


def test_attention_on_an_image():
    weights = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    found = attention.attention_on_image(weights, 4)
    expected = np.kron([[0.25, 0.5], [0.75, 1.0]], np.ones((2, 2)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
