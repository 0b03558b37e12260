"""Where would the time of a step go? Times of its parts on one device, one after the other.

    python -m benchmarks.gpu_micro --out=FILE.json [--toy]

Attention by cuDNN, by our two products and by jax.nn, for 197 tokens padded to 198; queries, keys
and values as one product or as three; patch embedding as a product and as a convolution; the
teacher alone. 256 images in bfloat16, forward and backward (the teacher forward only). FILE holds
{"name": {"ms", "compile_s"}}.
"""

import argparse
import functools
import math
import time
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp

from benchmarks import gpu_jax
from benchmarks.gpu_smoke import (
    Checks,
    kernels_gradient,
    patch_convolution,
    patch_product,
    pulled,
    random,
)
from deit_jax.models import attention, cudnn

WINDOWS, SECONDS = 5, 0.2


def padded(q, k, v):
    """Return cuDNN's attention of an odd number of tokens, with which JAX does not train it."""
    tokens = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(q.shape[:1], tokens, jnp.int32)
    words = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **words)
    return out[:, :tokens]


ATTENTIONS = {
    "cudnn": cudnn.attention,
    "cudnn, padded": padded,
    "xla": attention.softmax_attention,
    "jax.nn, xla": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
}


def timed(function, *operands) -> dict:
    """Return the milliseconds of a call, the median of windows, and the seconds to compile it."""
    compiled = jax.jit(function)

    def window(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            out = compiled(*operands)
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / calls

    first = window(1)
    calls = max(2, min(1000, math.ceil(SECONDS / min(window(2), window(2)))))
    times = [window(calls) for _ in range(WINDOWS)]
    return {"ok": True, "ms": 1e3 * median(times), "compile_s": first}


def attentions(batch: int, tokens: int, heads: int, name: str) -> dict:
    """One layer's attention, heads of 64."""
    operands = [random(seed, batch, tokens, heads, 64) for seed in range(4)]
    return timed(functools.partial(pulled, ATTENTIONS[name]), *operands)


def projections(batch: int, width: int, packed: bool) -> dict:
    """Queries, keys and values."""

    def split(x, kernel):
        parts = jnp.split(kernel, 3, axis=1)
        return jnp.concatenate([x @ part for part in parts], axis=-1)

    operands = random(0, batch, 198, width), random(1, width, 3 * width)
    grad = random(2, batch, 198, 3 * width)
    return timed(functools.partial(pulled, jnp.matmul if packed else split), *operands, grad)


def patches(batch: int, width: int, how: str) -> dict:
    """Patch embedding's value and the gradient of its kernel."""
    function = {"convolution": patch_convolution, "product": patch_product}[how]
    both = functools.partial(kernels_gradient, function)
    images, kernel = random(0, batch, 224, 224, 3), random(1, 16, 16, 3, width)
    return timed(both, kernel, images, random(2, batch, 196, width))


def teacher(batch: int, toy: bool) -> dict:
    """RegNetY-16GF's labels, its batch norm folded; {"images_per_second"} besides the rest."""
    row = {"model": "tiny", "image_size": 32 if toy else 224, "batch": batch, "part": "train"}
    config = gpu_jax.config_of(row | {"peer": "ours", "toy": toy})
    model, params = gpu_jax.resolved(config, 1000).random_teacher()
    images = jnp.full((batch, row["image_size"], row["image_size"], 3), 0.1)
    found = timed(lambda params, images: model.logits(params, images).argmax(-1), params, images)
    return found | {"images_per_second": 1e3 * batch / found["ms"]}


def all_of(times: Checks, toy: bool) -> None:
    """Measure every part, what decides most at first."""
    batch = 2 if toy else 256
    distilled, plain = ("cudnn", "xla", "jax.nn, xla"), ("cudnn, padded", "xla")
    for tokens, heads, names in ((198, 12, distilled), (198, 3, distilled), (197, 12, plain)):
        for name in names if jax.default_backend() == "gpu" else names[1:]:
            case = functools.partial(attentions, batch, tokens, heads, name)
            times.run(f"attention of {tokens} tokens, {heads} heads, {name}", case)
    times.run("teacher alone", functools.partial(teacher, batch, toy))
    for width in (192,) if toy else (768, 192):
        for how in ("product", "convolution"):
            times.run(f"patches to {width}, {how}", functools.partial(patches, batch, width, how))
        for packed in (False, True):
            name = f"q, k, v of {width}, {'one product' if packed else 'three'}"
            times.run(name, functools.partial(projections, batch, width, packed))


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="two images, to try the code on a CPU")
    options = parser.parse_args()
    all_of(Checks(options.out), options.toy)


if __name__ == "__main__":
    main()
