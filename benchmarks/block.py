"""What a transformer block of a training step costs a TPU, by XLA's estimate: ours and JAX's own.

    python -m benchmarks.block [--images=32] [--blocks=2] [--topology=v5e:2x2] [--json=FILE]

Forward, backward and a plain SGD update of some blocks of DeiT-B (bfloat16, 198 tokens, exact GELU)
on one chip, compiled with deit_jax/models/{attention,kernels}.py and with jax.nn's attention and
GELU in their place. Needs the extra `plan`; no TPU. A minute or two on one core.
"""

import argparse
import contextlib
import json
import sys
from importlib import metadata
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from deit_jax.models import attention, kernels, vit  # noqa: E402
from deit_jax.perf import hlo_cost, plan  # noqa: E402

TOKENS, WIDTH = 198, 768
JAXS = {
    "attention": (attention, lambda q, k, v, _: jax.nn.dot_product_attention(q, k, v)),
    "gelu": (kernels, lambda x: jax.nn.gelu(x, approximate=False)),
}
VARIANTS = {
    "ours": (),
    "JAX's GELU": ("gelu",),
    "JAX's attention": ("attention",),
    "both JAX's": ("attention", "gelu"),
}


def cycles(images: int, blocks: int, topology: str) -> float:
    """Return the estimated cycles of a block."""
    place = jax.sharding.SingleDeviceSharding(plan.devices_of(topology, 1)[0])
    block = vit.Block(12, 4.0, 0.0, None, "xla", jnp.bfloat16)
    x = jax.ShapeDtypeStruct((images, TOKENS, WIDTH), jnp.bfloat16, sharding=place)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, True, None)["params"], x)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place), params)

    def loss(all_params, x, weights):
        for params in all_params:
            x = block.apply({"params": params}, x, True, None)
        return jnp.sum(x.astype(jnp.float32) * weights)

    def step(all_params, x, weights):
        grads, grad_x = jax.grad(loss, argnums=(0, 1))(all_params, x, weights)
        return jax.tree.map(lambda p, g: p - g, all_params, grads), grad_x

    lowered = jax.jit(step, donate_argnums=0).lower([params] * blocks, x, x)
    with plan.quiet():
        return hlo_cost.cost(lowered.compile().as_text()).cycles / blocks


def main() -> None:
    """Compile each variant and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    result = {
        "images": args.images,
        "topology": args.topology,
        **{name: metadata.version(name) for name in ("jax", "libtpu")},
        "estimated_cycles_per_block": {},
    }
    for name, replaced in VARIANTS.items():
        with contextlib.ExitStack() as stack:
            for kernel in replaced:
                module, jaxs = JAXS[kernel]
                stack.enter_context(mock.patch.object(module, kernel, jaxs))
            found = cycles(args.images, args.blocks, args.topology)
        result["estimated_cycles_per_block"][name] = found
        print(f"{name}: {found / 1e6:.2f} M cycles a block", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
