"""Attention and GELU, where a transformer's step is won, with their gradients written out.

Which implementation a backend gets is decided here and nowhere else. The numbers beside the choices
are XLA's estimate for a block of DeiT-B, forward, backward and update, 32 images on a v5e:
4.59 M cycles with JAX's own of both, 3.66 M as here (`python -m benchmarks.block`).
"""

import re

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

SQRT_HALF = 0.5**0.5
INV_SQRT_2PI = 0.3989422804014327


def attention(
    q: Float[Array, "B N heads d"], k: Float[Array, "B N heads d"], v: Float[Array, "B N heads d"]
) -> Float[Array, "B N heads d"]:
    """Return softmax(q k^T / sqrt(d)) v, the softmax's statistics in float32 whatever the dtype.

    On NVIDIA GPUs since Ampere, cuDNN's flash attention where it takes the operands (half
    precision, d a multiple of 8 up to 128), which never writes the N x N scores; elsewhere
    softmax_attention.
    """
    if cudnn_takes(q) and _on_ampere_or_later():
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return softmax_attention(q, k, v)


def cudnn_takes(q: Float[Array, "B N heads d"]) -> bool:
    """Return whether cuDNN has a kernel for such queries on any GPU since Ampere."""
    return q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _on_ampere_or_later() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8.0  # AMD: gfx90a


@jax.custom_vjp
def softmax_attention(
    q: Float[Array, "B N heads d"], k: Float[Array, "B N heads d"], v: Float[Array, "B N heads d"]
) -> Float[Array, "B N heads d"]:
    """Return what `attention` does, by two batched products, the gradient written out."""
    return _attention_forward(q, k, v)[0]


def _attention_forward(q, k, v):
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Rounded weights and their sum leave one loop together. Without the barrier XLA moves the
    # division into it, computes every exponential twice and writes the logits in float32 between.
    weights, total = jax.lax.optimization_barrier((weights.astype(v.dtype), total))
    scale = 1.0 / total
    out = jnp.einsum("bhnm,bmhd->bnhd", weights, v, preferred_element_type=jnp.float32)
    out = (out * scale.transpose(0, 2, 1, 3)).astype(v.dtype)
    return out, (q, k, v, weights, scale, out)


def _attention_backward(saved, grad):
    q, k, v, weights, scale, out = saved
    probs = weights.astype(jnp.float32) * scale
    grad_v = jnp.einsum("bhnm,bnhd->bmhd", probs.astype(grad.dtype), grad)
    grad_probs = jnp.einsum("bnhd,bmhd->bhnm", grad, v, preferred_element_type=jnp.float32)
    # sum_m p dp = sum_d do o (FlashAttention, Dao et al. 2022, eq. 4): d numbers a row, not N.
    terms = grad.astype(jnp.float32) * out.astype(jnp.float32)
    mean = jax.lax.platform_dependent(terms, tpu=_row_sums_by_product, default=_row_sums)
    grad_logits = probs * (grad_probs - mean)
    grad_logits = (grad_logits * q.shape[-1] ** -0.5).astype(q.dtype)
    grad_q = jnp.einsum("bhnm,bmhd->bnhd", grad_logits, k)
    return grad_q, jnp.einsum("bhnm,bnhd->bmhd", grad_logits, q), grad_v


softmax_attention.defvjp(_attention_forward, _attention_backward)


def _row_sums(terms: Float[Array, "B N heads d"]) -> Float[Array, "B heads N 1"]:
    return rearrange(terms.sum(-1), "b n h -> b h n 1")


def _row_sums_by_product(terms: Float[Array, "B N heads d"]) -> Float[Array, "B heads N 1"]:
    # A TPU multiplies faster than it sums along a register's lanes; with fewer columns XLA would
    # sum after all. "high" keeps 16 bits of a summand in bfloat16's passes.
    ones = jnp.ones((terms.shape[-1], 8), jnp.float32)
    return jnp.einsum("bnhd,de->bhne", terms, ones, precision="high")[..., :1]


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return x Phi(x), Phi the normal distribution's: the exact GELU, in float32 inside."""
    return _gelu_and_slope(x)[0]


def _gelu_and_slope(x):
    # The slope is kept instead of x: as large, and the backward pass has no erf and no exp then.
    wide = x.astype(jnp.float32)
    phi = 0.5 * (1.0 + jax.lax.erf(wide * SQRT_HALF))
    slope = phi + wide * jnp.exp(-0.5 * wide * wide) * INV_SQRT_2PI
    return (wide * phi).astype(x.dtype), slope.astype(x.dtype)


gelu.defvjp(_gelu_and_slope, lambda slope, grad: (slope * grad,))
