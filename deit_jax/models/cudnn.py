"""cuDNN's flash attention on this machine's NVIDIA GPU: whether it takes an attention, and it."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np

log = logging.getLogger("deit_jax")

AMPERE, HOPPER = 8.0, 9.0  # compute capabilities
LARGEST_HEAD = {AMPERE: 128, HOPPER: 256}  # and a multiple of 8, by cuDNN's documentation


def attention(q, k, v):
    """Return softmax(q k^T / sqrt(d)) v for half-precision [B N heads d], never writing N x N."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def refusal(shape: tuple[int, ...], dtype) -> str:
    """Return why cuDNN does not take an attention of queries [B N heads d] here, "" if it does.

    What is documented is answered at once. What is left is tried, forward and backward, once for
    each shape; a failure is logged in one line.
    """
    capability = compute_capability()
    if capability is None:
        return "it needs an NVIDIA GPU that JAX sees"
    if capability < AMPERE:
        return f"the GPU's compute capability is {capability}, and cuDNN's attention needs 8.0"
    if jnp.dtype(dtype).itemsize != 2:
        return f"cuDNN computes attention in bfloat16 and float16 only, not {jnp.dtype(dtype).name}"
    size = shape[-1]
    largest = LARGEST_HEAD[HOPPER if capability >= HOPPER else AMPERE]
    if size % 8 or size > largest:
        return f"a head has {size} numbers; cuDNN takes multiples of 8 up to {largest}"
    batch, *rest = shape  # of all devices
    return _tried((max(1, batch // jax.device_count()), *rest), jnp.dtype(dtype).name)


def compute_capability() -> float | None:
    """Return that of this process's first NVIDIA GPU, as 9.0; None without one.

    JAX gives AMD's GPUs names instead of numbers, as gfx90a.
    """
    if jax.default_backend() != "gpu":
        return None
    text = str(getattr(jax.local_devices()[0], "compute_capability", None))
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else None


@functools.cache
def _tried(shape: tuple[int, ...], dtype: str) -> str:
    """Return what cuDNN says against such an attention, "" if it computes it."""

    def both(x):
        out, pull = jax.vjp(attention, x, x, x)
        return pull(out)

    try:
        # Inside the trace of a model: what is computed here must not become part of it.
        with jax.ensure_compile_time_eval():
            jax.block_until_ready(jax.jit(both)(np.zeros(shape, dtype)))
    except Exception as error:
        # The kinds of error differ: a shape may be refused by JAX, by cuDNN or by the compiler.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        log.info("attention of %s %s without cuDNN, which says: %s", shape, dtype, reason)
        return f"cuDNN says: {reason}"
    return ""
