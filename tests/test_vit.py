"""The transformer: sizes, initialisation, tokens, and logits against timm."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import deit_jax
from deit_jax.models import registry, vit

GOLDEN = json.loads((Path(__file__).parent / "golden" / "parameters.json").read_text())


def abstract_params(name):
    model = deit_jax.create_model(name)
    size = registry.get_spec(name).image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def test_every_registered_name_has_a_published_parameter_count():
    assert sorted(GOLDEN) == deit_jax.list_models()


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_parameter_count(name):
    counted = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(name)))
    assert counted == GOLDEN[name]


def small(**overrides):
    fields = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "num_heads": 3}
    name = "deit_tiny_distilled_patch16_224"
    return deit_jax.create_model(name, num_classes=7, **(fields | overrides))


def images(n=2, size=32):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, size, size, 3)), jnp.float32)


def init(model):
    return jax.jit(model.init)(jax.random.key(0), images())


def apply(model, variables):
    return jax.jit(model.apply)(variables, images())


@pytest.mark.parametrize(("side", "patch", "channels"), [(32, 8, 3), (12, 4, 1), (15, 5, 2)])
def test_patches_times_a_kernel_are_its_convolution(side, patch, channels):
    layer = vit.PatchEmbed(patch, 24, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (3, side, side, channels))
    params = layer.init(jax.random.key(1), x)["params"]
    kernel, bias = params["proj"]["kernel"], params["proj"]["bias"]
    assert kernel.shape == (patch, patch, channels, 24)
    bound = (patch * patch * channels) ** -0.5  # PyTorch's, of a convolution
    for leaf in (kernel, bias):
        assert float(jnp.abs(leaf).max()) <= bound
    assert float(kernel.std()) == pytest.approx(bound / 3**0.5, rel=0.1)

    def convolution(kernel):
        out = jax.lax.conv_general_dilated(
            x, kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out.reshape(3, -1, 24) + bias

    def own(kernel):
        return layer.apply({"params": {"proj": {"kernel": kernel, "bias": bias}}}, x)

    (want, pull_want), (got, pull_got) = (jax.vjp(f, kernel) for f in (convolution, own))
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(pull_got(want)[0], pull_want(want)[0], atol=1e-4)


def test_initialisation_is_the_references():
    params = init(small(width=192))["params"]
    # timm's truncation at +-2 leaves a plain normal of std 0.02, not JAX's 0.0176.
    for leaf in (
        params["pos_embed"],
        params["dist_token"],
        params["head_dist"]["kernel"],
        params["blocks_0"]["attn"]["qkv"]["kernel"],
        params["blocks_2"]["mlp"]["fc2"]["kernel"],
    ):
        assert stats.kstest(np.ravel(leaf), stats.norm(0, 0.02).cdf).pvalue > 1e-3
    bound = (8 * 8 * 3) ** -0.5  # PyTorch's convolution default, weight and bias
    uniform = stats.uniform(-bound, 2 * bound)
    for leaf in params["patch_embed"]["proj"].values():
        assert stats.kstest(np.ravel(leaf), uniform.cdf).pvalue > 1e-3
    assert not np.any(params["blocks_1"]["attn"]["proj"]["bias"])
    np.testing.assert_array_equal(params["norm"]["scale"], 1)


def test_stochastic_depth_grows_linearly_or_is_constant():
    np.testing.assert_allclose(
        small(depth=5, drop_path=0.2).drop_path_rates(), [0, 0.05, 0.1, 0.15, 0.2]
    )
    constant = small(depth=3, drop_path=0.2, constant_drop_path=True)
    assert constant.drop_path_rates() == [0.2] * 3


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    model = small(depth=2, drop_path=0.25, constant_drop_path=True)
    scales = np.asarray(model.draw_scales(jax.random.key(0), 4000))
    assert scales.shape == (4000, 4)  # two branches a block
    assert set(np.unique(scales).round(5)) == {0.0, np.float32(1 / 0.75).round(5)}
    dropped = (scales == 0).sum(0)
    assert all(stats.binomtest(int(n), 4000, 0.25).pvalue > 0.001 for n in dropped)
    both = int(((scales[:, 0] == 0) & (scales[:, 1] == 0)).sum())  # independent of each other
    assert stats.binomtest(both, 4000, 0.25**2).pvalue > 0.001
    # A block of which both branches are dropped passes its input on; evaluation drops nothing.
    variables = init(model)
    run = functools.partial(jax.jit(model.apply, static_argnames="train"), images=images())
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if {"proj", "fc2"} & {p.key for p in path[2:]} else x, variables
    )
    none = run(variables, train=True, scales=jnp.zeros((2, 4)))
    np.testing.assert_allclose(none.cls, run(silent).cls, atol=1e-5)
    all_on = run(variables, train=True, scales=jnp.ones((2, 4)))
    np.testing.assert_allclose(all_on.cls, run(variables).cls, atol=1e-5)


def test_a_plain_model_has_one_head_and_a_distilled_one_two():
    plain = deit_jax.create_model("deit_tiny_patch16_224", image_size=32, depth=1, width=12)
    heads = apply(plain, init(plain))
    assert heads.dist is None
    np.testing.assert_array_equal(heads.fused(), heads.cls)
    heads = apply(small(), init(small()))
    assert heads.cls.shape == heads.dist.shape == (2, 7)
    assert not np.allclose(heads.cls, heads.dist)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = small(dtype=jnp.bfloat16)
    variables = init(model)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    low, high = apply(model, variables), apply(small(), variables)
    assert low.cls.dtype == jnp.float32
    np.testing.assert_allclose(low.cls, high.cls, atol=0.02)
    assert not np.array_equal(low.cls, high.cls)


def test_remat_changes_neither_logits_nor_gradients():
    variables = init(small())

    def loss(params, model):
        heads = model.apply({"params": params}, images(), True, rngs={"dropout": jax.random.key(1)})
        return jnp.sum(heads.cls**2) + jnp.sum(heads.dist)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    models = small(drop_path=0.3), small(drop_path=0.3, remat=True)
    plain, remat = (gradient(variables["params"], model) for model in models)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, remat)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "model.width=48 is not a multiple of model.num_heads=5"),
        ({"image_size": 4}, "smaller than one patch"),
        ({"colour": 3}, "model.colour=3: deit_tiny_distilled_patch16_224 has no such field"),
    ],
)
def test_impossible_shapes_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)


def test_an_unknown_name_is_met_with_the_nearest_ones():
    with pytest.raises(ValueError, match="did you mean deit_small_patch16_224"):
        deit_jax.create_model("deit_smal_patch16_224")
