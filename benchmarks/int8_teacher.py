"""Would an int8 teacher say the same? Top-1 agreement with float32, and what int8 saves a TPU.

    python benchmarks/int8_teacher.py SOURCE WEIGHTS [WEIGHTS ...] [--views=2048] [--json=FILE]
    python benchmarks/int8_teacher.py --tpu [--json=FILE]

SOURCE is a data source, as folder:PHOTOGRAPHS (corpus.py makes such a folder); each of WEIGHTS is
anything that `deit predict` opens. The views are a run's own, once cropped and flipped only, once
with the recipe's RandAugment, erasing and mixing, which is what a teacher is asked about.

Post-training quantisation, simulated exactly: the products are of integers, kept in float32, which
holds the sums of most layers to the last bit. Weights: symmetric, a scale for each output channel.
Inputs of every convolution and product: symmetric, with one scale for each image, found as it
comes, or one for the layer, by the largest value of the first views. "inside" leaves the first
convolution and the classifier in float32. bfloat16, which teachers run in, is measured beside it.

--tpu compiles one bottleneck of each of RegNetY-16GF's four stages for a v5e in both, 32 images.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from deit_jax.configs import deit  # noqa: E402
from deit_jax.data.batches import TrainBatches  # noqa: E402
from deit_jax.data.order import EpochOrder  # noqa: E402
from deit_jax.data.sources.registry import open_dataset  # noqa: E402
from deit_jax.data.view import reading_of  # noqa: E402
from deit_jax.perf import hlo_cost, plan  # noqa: E402
from deit_jax.step.train_step import model_inputs  # noqa: E402
from deit_jax.train.experiment import settings_of  # noqa: E402
from deit_jax.weights.load import folded, open_model  # noqa: E402

BATCH, LEVELS, CALIBRATION = 64, 127.0, 4
KINDS = ("bfloat16", "int8 by image", "int8 by layer", "int8 by image, inside")
# Width, side of the image, and how many bottlenecks, of RegNetY-16GF's stages.
STAGES = ((224, 56, 2), (448, 28, 4), (1232, 14, 11), (3024, 7, 1))


def rounded(x, scale):
    """Return x on int8's grid."""
    return jnp.clip(jnp.round(x / scale), -LEVELS, LEVELS) * scale


def int8_weights(params, kept=()):
    """Return the parameters with every kernel on int8's grid, a scale for each output channel."""

    def one(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("kernel") or name.rsplit("/", 1)[0] in kept:
            return x
        top = jnp.max(jnp.abs(x), axis=tuple(range(x.ndim - 1)), keepdims=True)
        return rounded(x, jnp.maximum(top, 1e-30) / LEVELS)

    return jax.tree_util.tree_map_with_path(one, params)


def layers(model, params, images) -> list[str]:
    """Return the paths of all convolutions and products in the order they run."""
    found = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv | nn.Dense):
            found.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda p, x: model.apply({"params": p}, x, train=False).cls, params, images)
    return found


def predictor(model, params, kind: str, largest=None, kept=()):
    """Return images -> (classes, {layer: largest input}); `largest` fixes the layers' scales."""
    int8 = kind.startswith("int8")
    params = int8_weights(params, kept) if int8 else params
    if kind == "bfloat16":
        model = model.clone(dtype=jnp.bfloat16)

    def run(params, images):
        seen = {}

        def quantise(call, args, kwargs, context):
            name = "/".join(context.module.path)
            if isinstance(context.module, nn.Conv | nn.Dense):
                x, *rest = args
                seen[name] = jnp.max(jnp.abs(x))
                if int8 and name not in kept:
                    axes = tuple(range(1, x.ndim))
                    top = jnp.max(jnp.abs(x), axes, keepdims=True)
                    top = top if largest is None else largest[name]
                    args = (rounded(x, jnp.maximum(top, 1e-30) / LEVELS), *rest)
            return call(*args, **kwargs)

        with nn.intercept_methods(quantise):
            logits = model.apply({"params": params}, images, train=False).fused()
        return jnp.argmax(logits, -1), seen

    jitted = jax.jit(run)
    return lambda images: jitted(params, images)


def views(config, opened, count: int, recipe: bool):
    """Yield batches of normalised images as a run with these weights' mean and size makes them."""
    dataset = open_dataset(config.data)
    config.batch_size, config.augment.repeats = BATCH, 1
    if not recipe:
        config.augment.auto, config.augment.erase_prob, config.mixing.prob = "", 0.0, 0.0
    order = EpochOrder(len(dataset.train), BATCH, 1, 0)
    rows = list(range(BATCH))
    size, data = opened.image_size, config.data
    decoder = "pillow"
    batches = TrainBatches(
        dataset.train,
        order,
        config.augment,
        size,
        rows,
        decoder,
        data.skip_unreadable,
        reading_of(data),
    )
    made = settings_of(config, len(dataset.classes))
    made = made.__class__(**{**vars(made), "mean": opened.mean, "std": opened.std})
    inputs = jax.jit(lambda number, batch: model_inputs(number, batch, made)[0])
    for number in range(-(-count // BATCH)):
        yield inputs(number, jax.tree.map(jnp.asarray, dict(batches(number))))


def agreement(config, source: str, count: int, recipe: bool) -> dict:
    """Return in percent how often each kind names float32's class."""
    opened = open_model(source)
    model, params = folded(opened.model, opened.variables)
    batches = list(views(config, opened, count, recipe))
    names = layers(model, params, batches[0])
    kept = (names[0], names[-1])
    exact = predictor(model, params, "float32")
    truth, largest = [], defaultdict(float)
    for number, batch in enumerate(batches):
        classes, seen = exact(batch)
        truth.append(np.asarray(classes))
        for name, value in seen.items():
            if number < CALIBRATION:
                largest[name] = max(largest[name], float(value))
    result = {"weights": Path(source).name, "recipe": recipe, "views": BATCH * len(batches)}
    for kind in KINDS:
        scales = dict(largest) if kind.endswith("layer") else None
        run = predictor(model, params, kind, scales, kept if kind.endswith("inside") else ())
        same = [np.mean(np.asarray(run(b)[0]) == t) for b, t in zip(batches, truth, strict=True)]
        result[kind] = round(100 * float(np.mean(same)), 2)
    return result


def bottleneck_cycles(width: int, side: int, dtype) -> int:
    """Return the cycles of 1x1, grouped 3x3 and 1x1 convolutions of 32 images, one after another.

    int8's sums are int32; each is scaled, cut off at zero and rounded to the next one's input.
    """
    place = jax.sharding.SingleDeviceSharding(plan.devices_of("v5e:2x2", 1)[0])
    wide = jnp.int32 if dtype == jnp.int8 else jnp.float32

    def conv(x, kernel, scale, groups):
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            preferred_element_type=wide,
        )
        y = jax.nn.relu(y.astype(jnp.float32) * scale)
        return (jnp.minimum(jnp.round(y), LEVELS) if dtype == jnp.int8 else y).astype(dtype)

    def block(x, kernels, scales):
        for kernel, scale in zip(kernels, scales, strict=True):
            x = conv(x, kernel, scale, width // kernel.shape[2])
        return x

    group = 112
    shapes = [(1, 1, width, width), (3, 3, group, width), (1, 1, width, width)]
    x, *kernels = (
        jax.ShapeDtypeStruct(s, dtype, sharding=place) for s in [(32, side, side, width), *shapes]
    )
    scales = [jax.ShapeDtypeStruct((width,), jnp.float32, sharding=place)] * 3
    with plan.quiet():
        return hlo_cost.cost(jax.jit(block).lower(x, kernels, scales).compile().as_text()).cycles


def tpu() -> list[dict]:
    """Return and print the cycles of all stages in both kinds."""
    rows = []
    for width, side, count in STAGES:
        found = [bottleneck_cycles(width, side, d) for d in (jnp.bfloat16, jnp.int8)]
        rows.append({"width": width, "side": side, "blocks": count})
        rows[-1] |= dict(zip(("bfloat16", "int8"), found, strict=True))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", help="a data source, as folder:PATH or digits")
    parser.add_argument("weights", nargs="*")
    parser.add_argument("--views", type=int, default=2048)
    parser.add_argument("--tpu", action="store_true")
    parser.add_argument("--json", type=Path, help="results are added to this file")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for source in args.weights:
        for recipe in (False, True):
            config = deit.get_config()
            config.data.source, config.data.train_split = args.source, "train"
            row = agreement(config, source, args.views, recipe)
            found.setdefault("agreement", []).append({"data": args.source.split("/")[-1], **row})
            print(json.dumps(row), flush=True)
    if args.tpu:
        found["bottlenecks"] = tpu()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
