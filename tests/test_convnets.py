"""RegNetY and EfficientNet-Lite against their published figures and against timm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.models.conv import ConvNorm, fold_batch_norm
from deit_jax.models.efficientnet_lite import EfficientNetLite, InvertedResidual
from deit_jax.models.registry import create_model
from deit_jax.weights.torch_names import from_torch, to_torch
from tests.timm_reference import import_timm, import_torch

TIMM_NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}
TINY = {"widths": (16, 32), "depths": (1, 1), "group_width": 8, "stem_width": 8}
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
    model = create_model("regnety_002", num_classes=5, stem_stride=1, **TINY)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sorted(variables["params"]) == ["head", "s1", "s2", "stem"]
    assert jax.eval_shape(model.apply, variables, images).cls.shape == (2, 5)
    with pytest.raises(ValueError, match=r"model\.widths: 30 is not a multiple"):
        create_model("regnety_002", widths=(16, 30), depths=(1, 1))
    with pytest.raises(ValueError, match="differ in length"):
        create_model("regnety_002", widths=(16, 32))


def reference(name, size, width=None):
    """Return timm's model with random affine and running statistics, and a batch of images.

    Statistics are near the batch's own and the classifier is scaled, so that logits are O(1).
    An EfficientNet-Lite may have a share of its `width`.
    """
    timm, torch = import_timm(), import_torch()
    torch.manual_seed(0)
    if width:
        make = timm.models.efficientnet._gen_efficientnet_lite
        model = make(TIMM_NAMES[name], width, bn_eps=1e-3, pad_type="same")
    else:
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
    [
        ("regnety_002", 224),
        pytest.param("regnety_160", 64, marks=pytest.mark.slow),
        ("efficientnet_lite0", 224),
    ],
)
def test_logits_match_timm_folded_or_not(name, size):
    torch = import_torch()
    theirs, images = reference(name, size)
    with torch.no_grad():
        expected = theirs.eval()(images).numpy()
    assert 0.5 < expected.std() < 5
    variables = variables_of(theirs, name)
    del theirs  # a third of a GB in the largest, as is each copy of its weights below
    model, batch = create_model(name), nhwc(images)
    logits = jax.jit(model.apply)(variables, batch)
    assert logits.dist is None
    np.testing.assert_allclose(logits.cls, expected, atol=1e-4)
    folded = create_model(name, folded=True)
    params = fold_batch_norm(variables, model)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, shapes(folded)["params"]
    )
    logits = jax.jit(folded.apply)({"params": params}, batch)
    np.testing.assert_allclose(logits.cls, expected, atol=1e-4)


@pytest.mark.parametrize(("name", "width"), [("regnety_002", None), ("efficientnet_lite0", 0.25)])
def test_training_step_matches_timm(name, width, monkeypatch):
    torch = import_torch()
    theirs = reference(name, 64, width)[0]
    if width:  # compiling the gradient of depthwise convolutions of full width takes 3 GB
        narrow = dataclasses.replace(EfficientNetLite.VARIANTS[name], width=width)
        monkeypatch.setitem(EfficientNetLite.VARIANTS, name, narrow)
    variables = variables_of(theirs, name)
    # In float64, because a rounding error that flips one ReLU moves gradients by a percent.
    theirs.double().train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and name.startswith("efficientnet"):
            module.momentum = 0.01  # TensorFlow's .99, which timm uses only if asked (bn_tf)
    torch.manual_seed(1)
    images, weights = torch.randn(2, 3, 64, 64).double(), torch.randn(2, 1000).double()
    loss = (theirs(images) * weights).mean()
    loss.backward()
    quiet = {} if name.startswith("regnety") else {"drop_path": 0.0, "dropout": 0.0}
    model = create_model(name, dtype=jnp.float64, **quiet)

    def ours(params, stats, batch):
        collections = {"params": params, "batch_stats": stats}
        heads, state = model.apply(collections, batch, train=True, mutable=["batch_stats"])
        return (heads.cls * weights.numpy()).mean(), state

    with jax.enable_x64(True):
        params, stats = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))
        step = jax.jit(jax.value_and_grad(ours, has_aux=True))
        (value, state), grads = step(params, stats, nhwc(images))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    flat = to_torch({"params": grads, **state})
    for key, buffer in theirs.named_buffers():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_allclose(flat[key], buffer.numpy(), rtol=1e-6, atol=1e-9)
    for key, parameter in theirs.named_parameters():
        gradient = parameter.grad.numpy()
        error = np.linalg.norm(flat[key] - gradient)
        assert error <= 1e-5 * np.linalg.norm(gradient) + 1e-9, key


def random_like(shapes):
    """Return values for shapes without compiling an initialiser."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.uniform(0.1, 0.5, leaf.shape)), shapes)


def test_remat_changes_no_gradient():
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    model = create_model("regnety_002", num_classes=4, **TINY)
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), images))

    @functools.partial(jax.jit, static_argnums=1)
    def grads(params, remat):
        def loss(params):
            collections = {**variables, "params": params}
            apply = model.clone(remat=remat).apply
            heads, _ = apply(collections, images, train=True, mutable=["batch_stats"])
            return jnp.square(heads.cls).mean()

        return jax.grad(loss)(params)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        grads(variables["params"], True),
        grads(variables["params"], False),
    )


def test_stochastic_depth_drops_whole_residuals():
    conv_norm = ConvNorm(1e-3, 0.99, True, jnp.float32)
    block = InvertedResidual(conv_norm, 8, kernel=3, stride=1, expansion=6, drop_path=0.5)
    images = jax.random.normal(jax.random.key(1), (16, 4, 4, 8))
    params = random_like(
        jax.eval_shape(functools.partial(block.init, train=False), jax.random.key(0), images)
    )
    apply = jax.jit(block.apply, static_argnums=2)
    residual = apply(params, images, False) - images
    dropped = apply(params, images, True, rngs={"dropout": jax.random.key(2)}) - images
    kept = jnp.abs(dropped).max((1, 2, 3)) > 1e-6
    assert 0 < kept.sum() < 16
    np.testing.assert_allclose(dropped[kept], 2 * residual[kept], rtol=1e-4, atol=1e-5)


def test_bfloat16_compute_returns_float32_logits():
    model = create_model("regnety_002", num_classes=4, dtype=jnp.bfloat16)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(model.apply, variables, images).cls.dtype == jnp.float32
