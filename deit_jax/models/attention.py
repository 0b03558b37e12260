"""Self-attention: its gradient written out, and where cuDNN's kernel takes its place.

The numbers beside the choices are XLA's estimate for a block of DeiT-B, forward, backward and
update, 32 images on a v5e (`python -m benchmarks.block`), or were measured on a CPU
(`python -m benchmarks.cpu`).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from deit_jax.models import cudnn

CHOICES = ("auto", "cudnn", "xla")


def attention(
    q: Float[Array, "B N heads d"],
    k: Float[Array, "B N heads d"],
    v: Float[Array, "B N heads d"],
    choice: str = "auto",
) -> Float[Array, "B N heads d"]:
    """Return softmax(q k^T / sqrt(d)) v, the softmax's statistics in float32 whatever the dtype.

    `choice` is one of CHOICES. A program compiled for NVIDIA GPUs has cuDNN's flash attention,
    which never writes the N x N scores, where that takes the operands on this machine's GPU; for
    every other platform it has softmax_attention, whichever devices trace it. "cudnn" raises
    ValueError, with cuDNN's reason, where it does not take them; "xla" does not ask.
    """
    if choice == "xla":
        return softmax_attention(q, k, v)
    reason = cudnn.refusal(q.shape, q.dtype)
    if reason and choice == "cudnn":
        raise ValueError(f"model.attention='cudnn': {reason}; take auto or xla")
    if reason:
        return softmax_attention(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cuda=cudnn.attention, default=softmax_attention)


@jax.custom_vjp
def softmax_attention(
    q: Float[Array, "B N heads d"], k: Float[Array, "B N heads d"], v: Float[Array, "B N heads d"]
) -> Float[Array, "B N heads d"]:
    """Return what `attention` does, by two batched products, the gradient written out."""
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    out, weights, scale = jax.lax.platform_dependent(
        q, k, v, cpu=_forward_on_cpu, default=_forward_by_einsum
    )
    return out, (q, k, v, out, weights, scale)


def _backward(saved, grad):
    return jax.lax.platform_dependent(
        *saved, grad, cpu=_backward_on_cpu, default=_backward_by_einsum
    )


softmax_attention.defvjp(_forward, _backward)


def _forward_by_einsum(q, k, v):
    """Return the output, the exponentials [B heads N N] and one over their sums [B heads N 1]."""
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Rounded weights and their sum leave one loop together. Without the barrier XLA moves the
    # division into it, computes every exponential twice and writes the logits in float32 between.
    weights, total = jax.lax.optimization_barrier((weights.astype(v.dtype), total))
    scale = 1.0 / total
    out = jnp.einsum("bhnm,bmhd->bnhd", weights, v, preferred_element_type=jnp.float32)
    return (out * scale.transpose(0, 2, 1, 3)).astype(v.dtype), weights, scale


def _backward_by_einsum(q, k, v, out, weights, scale, grad):
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


def _row_sums(terms: Float[Array, "B N heads d"]) -> Float[Array, "B heads N 1"]:
    return rearrange(terms.sum(-1), "b n h -> b h n 1")


def _row_sums_by_product(terms: Float[Array, "B N heads d"]) -> Float[Array, "B heads N 1"]:
    # A TPU multiplies faster than it sums along a register's lanes; with fewer columns XLA would
    # sum after all. "high" keeps 16 bits of a summand in bfloat16's passes.
    ones = jnp.ones((terms.shape[-1], 8), jnp.float32)
    return jnp.einsum("bnhd,de->bhne", terms, ones, precision="high")[..., :1]


# On a CPU, XLA lays a batched product out as [b h d n], vectors as long as there are tokens, and
# turns operands and result for it: 0.26 ms for one of the quickstart's, where [b h n d] takes 0.08
# (AVX2, two cores). So the heads go first, and barriers keep XLA from moving them back.


def _forward_on_cpu(q, k, v):
    root, dtype = q.shape[-1] ** -0.5, v.dtype
    q, k, v = _heads_first(q, k, v)
    logits = _batched_product(q, k, contracting=(3, 3))
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) * root)
    scale = 1.0 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(dtype)
    out = (_batched_product(weights, v) * scale).astype(dtype)
    return out.swapaxes(1, 2), weights, scale


def _backward_on_cpu(q, k, v, out, weights, scale, grad):
    root, dtype = q.shape[-1] ** -0.5, q.dtype
    mean = _row_sums(grad.astype(jnp.float32) * out.astype(jnp.float32))
    q, k, v, grad = _heads_first(q, k, v, grad)
    probs = weights.astype(jnp.float32) * scale
    grad_probs = _batched_product(grad, v, contracting=(3, 3))
    grad_logits = (probs * (grad_probs - mean) * root).astype(dtype)
    turned = [x.swapaxes(2, 3) for x in (grad_logits, probs.astype(dtype))]
    logits_turned, probs_turned = jax.lax.optimization_barrier(turned)
    products = ((grad_logits, k), (logits_turned, q), (probs_turned, grad))
    return tuple(_batched_product(*pair).astype(dtype).swapaxes(1, 2) for pair in products)


def _heads_first(*arrays: Float[Array, "B N heads d"]) -> list[Float[Array, "B heads N d"]]:
    return jax.lax.optimization_barrier([x.swapaxes(1, 2) for x in arrays])


def _batched_product(x, y, contracting: tuple[int, int] = (3, 2)):
    left, right = contracting
    dims = (((left,), (right,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
