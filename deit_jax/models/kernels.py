"""Products, layer norm and GELU with their gradients written out, where a step is won.

What a platform gets is decided where its program is compiled, in here and in attention.py and
nowhere else. The numbers beside the choices are XLA's estimate for DeiT-B, 32 images a v5e chip
(`deit plan`), or were measured on a CPU with AVX2 (`python -m benchmarks.cpu`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SQRT_HALF = 0.5**0.5
INV_SQRT_2PI = 0.3989422804014327
NORM_EPSILON = 1e-6  # timm's, of every layer norm


@jax.custom_vjp
def product(x: Float[Array, "*B K"], kernel: Float[Array, "K N"]) -> Float[Array, "*B N"]:
    """Return x @ kernel; its gradient is laid out for the platform that computes it."""
    return x @ kernel


def _product_backward(saved, grad):
    return jax.lax.platform_dependent(
        *saved, grad, cpu=_product_grads_on_cpu, default=_product_grads
    )


def _product_grads(x, kernel, grad):
    return jax.vjp(jnp.matmul, x, kernel)[1](grad)


def _product_grads_on_cpu(x, kernel, grad):
    # XLA's fast products on a CPU contract the left operand's last axis. The kernel's gradient
    # contracts the first, for which XLA falls back to products that take up to twice as long. So
    # the narrower operand is transposed, and barriers keep XLA from taking that back.
    rows, grads = (y.reshape(-1, y.shape[-1]) for y in (x, grad))
    if rows.shape[1] <= grads.shape[1]:
        grad_kernel = jax.lax.optimization_barrier(rows.T) @ grads
    else:
        grad_kernel = jax.lax.optimization_barrier(jax.lax.optimization_barrier(grads.T) @ rows).T
    return (grads @ kernel.T).reshape(x.shape), grad_kernel


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


def dense_product(x, kernel, dimension_numbers, precision=None):
    """Return `product`, called as flax's Dense calls its dot_general."""
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or precision is not None:
        raise ValueError("only nn.Dense's own product, in the default precision")
    return product(x, kernel)


@jax.custom_vjp
def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"]
) -> Float[Array, "*B D"]:
    """Return (x - mean) / sqrt(variance + 1e-6) * scale + bias of every row, in float32 inside.

    The values are those of flax's LayerNorm. Its gradient, dx = (g - mean(g) - n mean(g n)) / s
    with g = dy scale, n the normalised row and s its deviation, in two passes: 1.0 M of a step's
    53 M cycles less than derived from the forward pass.
    """
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    variance = jnp.maximum(0.0, jnp.square(wide).mean(axis=-1, keepdims=True) - jnp.square(mean))
    inverse = jax.lax.rsqrt(variance + NORM_EPSILON)
    out = (wide - mean) * (inverse * scale) + bias
    return out.astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(saved, grad):
    x, mean, inverse, scale = saved
    normed = (x.astype(jnp.float32) - mean) * inverse
    grad = grad.astype(jnp.float32)
    terms = grad * normed
    sums, weighted = jax.lax.platform_dependent(
        grad, terms, scale, cpu=_scaled_sums_by_product, default=_scaled_sums
    )
    grad_x = inverse * (grad * scale - (sums + normed * weighted) / x.shape[-1])
    rows = tuple(range(x.ndim - 1))
    return grad_x.astype(x.dtype), terms.sum(rows), grad.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _scaled_sums(*operands):
    *terms, scale = operands
    return tuple((x * scale).sum(axis=-1, keepdims=True) for x in terms)


def _scaled_sums_by_product(*operands):
    # On a CPU XLA would first write `scale` out for every row, to hand it to the sum.
    *terms, scale = operands
    return tuple(
        (x.reshape(-1, x.shape[-1]) @ scale[:, None]).reshape(*x.shape[:-1], 1) for x in terms
    )


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
