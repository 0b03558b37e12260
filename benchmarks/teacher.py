"""What the frozen teacher adds to a training step on TPUs, by XLA's estimate.

    python -m benchmarks.teacher [--images=32,128] [--topology=v5e:4x4] [--out=FILE]
    python -m benchmarks.teacher --rows=teacher --images=128 [--model=NAME | --weights=FOLDER]

The teacher (RegNetY-16GF, batch norm folded, bfloat16, hard labels) alone on one chip, whole and in
parts of 32 images; DeiT-B's step without it; both in one program. Also what the compiled teacher
computes in and gives out, and the order of it all. Needs the extra `plan`; no TPU. Rows that FILE
already has are not compiled again: a fused one takes five minutes of one core, others one or two.
With --model another of our networks teaches, with --weights a teacher folder.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from deit_jax.configs import deit  # noqa: E402
from deit_jax.perf import hlo_cost, plan  # noqa: E402
from deit_jax.step import micro_batches  # noqa: E402
from deit_jax.train.experiment import resolve  # noqa: E402

PART = 32  # images of DeiT-B in a micro-batch on a TPU
ROWS = ("teacher", "teacher in parts", "student", "fused")


def config_of(images: int, kind: str, chips: int = 1, weights: str = "", model: str = ""):
    """Return the paper's DeiT-B with a distillation token, in bfloat16."""
    config = deit.get_config("variant=base,distilled=True")
    config.batch_size, config.dtype, config.distill.kind = images * chips, "bfloat16", kind
    config.teacher.weights = weights
    config.teacher.model.name = model or config.teacher.model.name
    return config


def teacher_alone(topology: str, images: int, part: int, **teacher: str):
    """Compile the teacher's labels of a chip's images, taken so many at a time."""
    place = jax.sharding.SingleDeviceSharding(plan.devices_of(topology, 1)[0])
    devices = plan.devices_of(topology, 1)[:1]
    experiment = resolve(config_of(images, "hard", **teacher), 1000, 1_281_167, devices)
    teacher, params = experiment.abstract_teacher()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, jax.ShapeDtypeStruct((images, 224, 224, 3), jnp.float32)),
    )

    def labels(params, batch):
        return micro_batches.in_parts(
            lambda x: teacher.logits(params, x).argmax(-1), batch, images // part
        )

    with plan.quiet():
        return jax.jit(labels).lower(*shapes).compile()


def step(topology: str, images: int, kind: str, **teacher: str):
    """Compile the training step of a run, with the teacher for kind "hard"."""
    devices = plan.devices_of(topology, 1)
    config = config_of(images, kind, len(devices), **teacher)
    experiment = resolve(config, 1000, 1_281_167, devices)
    with plan.quiet():
        return plan.lower_step(experiment)[0].compile()


def products(text: str) -> Counter:
    """Count the convolutions and matrix products of a program by the dtypes of their operands."""
    found = Counter()
    for instructions in hlo_cost._parse(text)[0].values():
        shapes = {i.name: i.shape.partition("[")[0] for i in instructions}
        for i in instructions:
            if i.opcode in ("convolution", "dot"):
                found[" x ".join(shapes.get(name, "?") for name in i.operands[:2])] += 1
    return found


def order(text: str) -> list[str]:
    """Return what a program does in its order: the teacher, loops and collectives, runs as one."""
    computations, entry = hlo_cost._parse(text)
    found = []
    for i in computations[entry]:
        kind = i.opcode.removesuffix("-start").replace("-", "_")
        if kind in hlo_cost.COLLECTIVES or kind == "while":
            found.append(i.opcode)
        elif "RegNetY" in i.rest and '"estimated_cycles"' in i.rest:
            found.append("teacher")
    return [kind for kind, _ in itertools.groupby(found)]


def measure(row: str, topology: str, images: int, **teacher: str) -> dict:
    """Return the figures of a row."""
    if row.startswith("teacher"):
        part = PART if row.endswith("parts") else images
        compiled = teacher_alone(topology, images, part, **teacher)
    else:
        kind = "hard" if row == "fused" else "none"
        compiled = step(topology, images, kind, **(teacher if row == "fused" else {}))
    text = compiled.as_text()
    cost, memory = hlo_cost.cost(text), compiled.memory_analysis()
    result = {
        "row": row,
        "images": images,
        "estimated_cycles": cost.cycles,
        "custom_calls": cost.custom_calls,
        "unknown_loops": cost.unknown_loops,
        "temp_bytes": memory.temp_size_in_bytes,
        "order": order(text),
    }
    if row == "teacher":
        result["output_bytes"] = memory.output_size_in_bytes
        result["products"] = products(text)
    return result


def main() -> None:
    """Compile what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="32,128")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="", help="the teacher's, if not regnety_160")
    parser.add_argument("--weights", default="", help="a teacher folder")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    found = {"topology": args.topology, "rows": []}
    if args.out and args.out.exists():
        found = json.loads(args.out.read_text())
    known = (found.get("weights", ""), found.get("model", ""))
    if found["rows"] and known != (args.weights, args.model):
        parser.error(f"{args.out} is of another teacher")
    found |= {"weights": args.weights, "model": args.model}
    found |= {name: metadata.version(name) for name in ("jax", "libtpu")}
    wanted = [(r, int(n)) for n in args.images.split(",") for r in args.rows.split(",")]
    for row, images in wanted:
        have = [r for r in found["rows"] if (r["row"], r["images"]) == (row, images)]
        if have or (row == "teacher in parts" and images <= PART):
            continue
        result = measure(row, args.topology, images, weights=args.weights, model=args.model)
        found["rows"].append(result)
        print(f"{row}, {images} a chip: {result['estimated_cycles'] / 1e6:.1f} M", flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
