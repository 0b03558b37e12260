"""RegNetY and EfficientNet-Lite against their published figures and against timm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from timm_reference import import_timm, import_torch

from deit_jax.models.conv import fold_batch_norm
from deit_jax.models.registry import create_model
from deit_jax.weights import from_torch, to_torch

TIMM_NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}
PARAMETERS = {
    "regnety_002": 3_162_996,
    "regnety_004": 4_344_144,
    "regnety_040": 20_646_656,
    "regnety_080": 39_180_068,
    "regnety_120": 51_822_544,
    "regnety_160": 83_590_140,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
}


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    params = shapes(create_model(name))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "widths", "depths", "group"),
    [
        ("regnety_160", (224, 448, 1232, 3024), (2, 4, 11, 1), 112),
        ("regnety_120", (224, 448, 896, 2240), (2, 5, 11, 1), 112),
        ("regnety_080", (168, 448, 896, 2016), (2, 4, 10, 1), 56),
        ("regnety_040", (128, 192, 512, 1088), (2, 6, 12, 2), 64),
    ],
)
def test_regnet_stages(name, widths, depths, group):
    assert create_model(name).stages() == (widths, depths, (group,) * 4)


def test_custom_regnet_for_small_images():
    tiny = {"widths": (16, 32), "depths": (1, 2), "group_width": 8, "stem_width": 8}
    model = create_model("regnety_002", num_classes=5, stem_stride=1, **tiny)
    images = jnp.zeros((2, 32, 32, 3))
    variables = model.init(jax.random.key(0), images)
    assert sorted(variables["params"]) == ["head", "s1", "s2", "stem"]
    assert model.apply(variables, images).cls.shape == (2, 5)
    with pytest.raises(ValueError, match=r"model\.widths: 30 is not a multiple"):
        create_model("regnety_002", widths=(16, 30), depths=(1, 1))
    with pytest.raises(ValueError, match="differ in length"):
        create_model("regnety_002", widths=(16, 32))


@functools.cache
def reference(name, size):
    """Return timm's model with random affine and running statistics, and a batch of images.

    Statistics are near the batch's own and the classifier is scaled, so that logits are O(1).
    """
    timm, torch = import_timm(), import_torch()
    torch.manual_seed(0)
    model = timm.create_model(TIMM_NAMES.get(name, name))
    images = torch.randn(2, 3, size, size)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
            norm.momentum, momentum = 1.0, norm.momentum
            norm.default_momentum = momentum
        model.train()(images)
        for norm in norms:
            norm.momentum = norm.default_momentum
            norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.2)
        classifier = model.get_classifier()
        classifier.weight /= model.eval()(images).std()
        classifier.bias.normal_()
    return model, images


def variables_of(model, name):
    return from_torch({k: v.numpy() for k, v in model.state_dict().items()}, name)


def nhwc(images):
    return jnp.asarray(images.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("name", "size"),
    [("regnety_002", 224), ("regnety_160", 64), ("efficientnet_lite0", 224)],
)
def test_logits_match_timm_folded_or_not(name, size):
    torch = import_torch()
    theirs, images = reference(name, size)
    with torch.no_grad():
        expected = theirs.eval()(images).numpy()
    assert 0.5 < expected.std() < 5
    variables = variables_of(theirs, name)
    model, batch = create_model(name), nhwc(images)
    logits = jax.jit(model.apply)(variables, batch)
    assert logits.dist is None
    np.testing.assert_allclose(logits.cls, expected, atol=1e-4)
    folded = create_model(name, folded=True)
    params = fold_batch_norm(variables, model.bn_epsilon)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, shapes(folded)["params"]
    )
    logits = jax.jit(folded.apply)({"params": params}, batch)
    np.testing.assert_allclose(logits.cls, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["regnety_002", "efficientnet_lite0"])
def test_training_step_matches_timm(name):
    torch = import_torch()
    theirs, images = reference(name, 64)
    variables = variables_of(theirs, name)
    weights = torch.randn(2, 1000)
    theirs.train().zero_grad()
    loss = (theirs(images) * weights).mean()
    loss.backward()
    quiet = {} if name.startswith("regnety") else {"drop_path": 0.0, "dropout": 0.0}
    model = create_model(name, **quiet)

    def ours(params):
        collections = {"params": params, "batch_stats": variables["batch_stats"]}
        heads, state = model.apply(collections, nhwc(images), train=True, mutable=["batch_stats"])
        return (heads.cls * weights.numpy()).mean(), state

    (value, state), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(variables["params"])
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4, atol=1e-6)
    flat = to_torch({"params": grads, **state})
    for key, buffer in theirs.named_buffers():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_allclose(flat[key], buffer.numpy(), rtol=1e-3, atol=1e-4)
    for key, parameter in theirs.named_parameters():
        gradient = parameter.grad.numpy()
        error = np.linalg.norm(flat[key] - gradient)
        assert error <= 1e-3 * np.linalg.norm(gradient) + 1e-7, key


@pytest.mark.parametrize("name", ["regnety_002", "efficientnet_lite0"])
def test_remat_and_stochastic_depth(name):
    model = create_model(name, num_classes=4, drop_path=0.5, remat=True)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    if name.startswith("regnety"):  # blocks start as identities: their dropping would not show
        variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)

    @jax.jit
    def logits(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0].cls

    np.testing.assert_array_equal(logits(0), logits(0))
    assert not np.allclose(logits(0), logits(1))


def test_bfloat16_compute_returns_float32_logits():
    model = create_model("regnety_002", num_classes=4, dtype=jnp.bfloat16)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(model.apply, variables, images).cls.dtype == jnp.float32
