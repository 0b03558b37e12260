"""Attention and GELU against JAX's own and PyTorch's, values and gradients, in every precision."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from deit_jax.models import kernels


def operands(dtype, shape=(3, 50, 4, 16), scale=2.0):
    keys = jax.random.split(jax.random.key(0), 4)
    return [(scale * jax.random.normal(k, shape)).astype(dtype) for k in keys]


def reference_attention(q, k, v):
    """Return attention in float64 numpy, from its formula."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return np.einsum("bhnm,bmhd->bnhd", special.softmax(logits, axis=-1), v)


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.04)])
def test_attention_is_its_formula(dtype, atol):
    q, k, v, _ = operands(dtype)
    out = kernels.attention(q, k, v)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float64), reference_attention(q, k, v), atol=atol, rtol=0
    )


@pytest.mark.parametrize(("dtype", "times"), [(jnp.float32, 3.0), (jnp.bfloat16, 2.5)])
def test_attentions_gradient_is_as_good_as_jaxs(dtype, times):
    """Compare the distance from the gradient in float32, in units of that of JAX's attention."""
    *operand, grad = operands(dtype)

    def gradients(function, operand):
        out, pull = jax.vjp(function, *operand)
        return pull(grad.astype(out.dtype))

    exact = gradients(jax.nn.dot_product_attention, [x.astype(jnp.float32) for x in operand])
    ours = gradients(kernels.softmax_attention, operand)
    jaxs = gradients(jax.nn.dot_product_attention, operand)
    for a, b, e in zip(ours, jaxs, exact, strict=True):
        assert a.dtype == dtype
        own, other = (np.linalg.norm((x.astype(jnp.float32) - e).ravel()) for x in (a, b))
        assert own <= times * other + 1e-6 * np.linalg.norm(np.ravel(e))


def test_attention_bears_large_logits_of_either_sign():
    q, k, v, _ = operands(jnp.float32, scale=40.0)
    out, pull = jax.vjp(kernels.softmax_attention, q, k, v)
    np.testing.assert_allclose(out, reference_attention(q, k, v), atol=1e-2)
    assert all(bool(jnp.isfinite(g).all()) for g in pull(out))


@pytest.mark.parametrize(
    ("platform", "by_product"), [("cpu", False), ("cuda", False), ("tpu", True)]
)
def test_only_a_tpu_sums_rows_by_a_product(platform, by_product):
    q, k, v, grad = operands(jnp.float32)
    gradient = jax.jit(lambda *qkv: jax.vjp(kernels.softmax_attention, *qkv)[1](grad))
    program = gradient.trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.dot_general") == 6 + by_product
    terms = np.asarray(grad)
    for sums in (kernels._row_sums, kernels._row_sums_by_product):
        found = sums(jnp.asarray(terms))
        assert found.shape == (3, 4, 50, 1)
        np.testing.assert_allclose(found[..., 0], terms.sum(-1).transpose(0, 2, 1), atol=1e-4)


def test_cudnn_is_asked_only_for_what_it_takes():
    def takes(dtype, d):
        return kernels.cudnn_takes(jnp.zeros((1, 2, 1, d), dtype))

    assert takes(jnp.bfloat16, 64)
    assert takes(jnp.float16, 80)
    assert not takes(jnp.float32, 64)
    assert not takes(jnp.bfloat16, 65)
    assert not takes(jnp.bfloat16, 136)


@pytest.mark.parametrize(
    ("capability", "expected"), [("9.0", True), ("10.0", True), ("7.5", False), ("gfx90a", False)]
)
def test_a_gpu_with_it_gets_cudnn(monkeypatch, capability, expected):
    asked, device = {}, types.SimpleNamespace(compute_capability=capability)
    operands_of = {k: operands(k)[:3] for k in (jnp.bfloat16, jnp.float32)}

    def recorded(q, k, v, **options):
        asked.update(options)
        return q

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    kernels.attention(*operands_of[jnp.bfloat16])
    assert asked == ({"implementation": "cudnn"} if expected else {})
    asked.clear()
    kernels.attention(*operands_of[jnp.float32])
    assert asked == {}


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
