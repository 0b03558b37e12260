"""Products, layer norm and GELU against flax's, JAX's and their formulas, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import special

from deit_jax.models import kernels


@pytest.mark.parametrize("shape", [(4, 9, 24, 40), (4, 9, 40, 24), (7, 1, 16, 16)])
def test_every_platforms_gradient_of_a_product_is_that_of_matmul(shape):
    batch, tokens, left, right = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, grad = (
        jax.random.normal(key, size)
        for key, size in zip(
            keys, [(batch, tokens, left), (left, right), (batch, tokens, right)], strict=True
        )
    )
    expected = jnp.einsum("bnk,dk->bnd", grad, kernel), jnp.einsum("bnd,bnk->dk", x, grad)
    out, pull = jax.vjp(kernels.product, x, kernel)
    np.testing.assert_allclose(out, x @ kernel, atol=1e-5)
    saved = (x, kernel, grad)
    for found in (
        pull(grad),
        kernels._product_grads(*saved),
        kernels._product_grads_on_cpu(*saved),
    ):
        for got, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_dense_layer_asks_for_nothing_that_product_does_not_do():
    x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    dims = (((1,), (0,)), ((), ()))
    np.testing.assert_array_equal(kernels.dense_product(x, kernel, dims), 3 * jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="own product"):
        kernels.dense_product(x, kernel, (((0,), (0,)), ((), ())))
    with pytest.raises(ValueError, match="own product"):
        kernels.dense_product(x, kernel, dims, precision="highest")


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("sums", ["_scaled_sums", "_scaled_sums_by_product"])
def test_layer_norm_and_its_gradient_are_flaxs(monkeypatch, dtype, tolerance, sums):
    monkeypatch.setattr(kernels, "_scaled_sums_by_product", getattr(kernels, sums))
    keys = jax.random.split(jax.random.key(0), 4)
    x = (3 + 2 * jax.random.normal(keys[0], (3, 7, 48))).astype(dtype)
    scale, bias = jax.random.normal(keys[1], (48,)), jax.random.normal(keys[2], (48,))
    grad = jax.random.normal(keys[3], x.shape).astype(dtype)
    layer = nn.LayerNorm(epsilon=1e-6, dtype=dtype)

    def flaxs(x, scale, bias):
        return layer.apply({"params": {"scale": scale, "bias": bias}}, x)

    (own, pull), (other, reference) = (
        jax.vjp(f, x, scale, bias) for f in (kernels.layer_norm, flaxs)
    )
    assert own.dtype == dtype
    np.testing.assert_array_equal(np.asarray(own), np.asarray(other))
    for got, want in zip(pull(grad), reference(grad), strict=True):
        assert got.dtype == want.dtype
        got, want = (np.asarray(y, np.float64) for y in (got, want))
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_gelu_and_its_slope_are_exact(dtype, tolerance):
    x = jnp.linspace(-9, 9, 2001).astype(dtype)
    exact = np.asarray(x, np.float64)
    phi = 0.5 * special.erfc(-exact / np.sqrt(2))
    slope = phi + exact * np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    value, pull = jax.vjp(kernels.gelu, x)
    (grad,) = pull(jnp.ones_like(x))
    for got, expected in ((value, exact * phi), (grad, slope)):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), expected, rtol=tolerance, atol=tolerance
        )
