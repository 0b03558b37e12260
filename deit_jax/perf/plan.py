"""What a training step will need on TPUs, found by compiling it for them here: `deit plan`."""

import contextlib
import functools
import importlib.util
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax import cli, hlo, metrics, optim, parts, sharding
from deit_jax import config as config_lib
from deit_jax.bench_step import signal_of, without_teacher_weights
from deit_jax.chips import CHIPS, TPUS
from deit_jax.compiled_step import jit_train_step
from deit_jax.data.sources import open_dataset
from deit_jax.errors import UserError
from deit_jax.flops import flops_per_image
from deit_jax.plan_report import advice, report, sweep_report
from deit_jax.step import Recipe, init_state
from deit_jax.teacher import Teacher

log = logging.getLogger("deit_jax")

PLAN_DOC = """usage: deit plan --config=FILE[:ARGS] --topology=KIND:SIZE [--sweep] [--out=FILE]

Compile the config's training step, teacher included, for TPUs that need not be there, and tell what
it needs: memory, operations, communication, and the compiler's own estimate of its time.
No data, no weights and no TPU are needed; compiling takes a minute or a few.

  deit plan --config=configs/deit.py:variant=base,distilled=True --topology=v5e:4x4
  deit plan --config=configs/deit3.py:size=huge --topology=v5e:8x8 --config.mesh.fsdp=8 --sweep

KIND is v4, v5e, v5p, v6e or tpu7x; SIZE counts chips: 2x2 to 16x16, or 2x2x1 and on for v4, v5p and
tpu7x (v4-64 and v5p-64 are 32 chips, 4x4x2). --config.mesh.slices=N plans N such slices. With
--sweep, less hungry variants of the config are compiled as well."""
# Classes and training images of data sets that need not be there to be planned for.
KNOWN_DATA = {"tfds:imagenet2012": (1000, 1_281_167)}
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
# Sizes in the compiler's message, of which it has several.
USED = (r"Used ([\d.]+)([KMGT]) of", r"\(([\d.]+)([KMGT])\) exceeds available HBM")


def parse_topology(text: str) -> tuple[str, int]:
    """Return the kind and number of chips of `v5e:4x4`; raise UserError for anything else."""
    match = re.fullmatch(r"([a-z]+\d+[a-z]*):([1-9]\d*(?:x[1-9]\d*){1,2})", text)
    kind, dims = (match[1], match[2].split("x")) if match else ("", [])
    if kind not in TPUS:
        raise UserError(f"--topology={text}: give {', '.join(TPUS)} and a size, as in v5e:4x4")
    wanted = 2 if kind in ("v5e", "v6e") else 3
    if len(dims) != wanted:
        example = "4x4" if wanted == 2 else "2x2x4"
        raise UserError(
            f"--topology={text}: a {kind} slice has {wanted} sides, as {kind}:{example}"
        )
    return kind, math.prod(map(int, dims))


def devices_of(topology: str, slices: int) -> list:
    """Return devices to compile for; raise UserError without libtpu or for an impossible slice."""
    kind, chips = parse_topology(topology)
    if chips > 256:
        raise UserError(f"--topology={topology}: {chips} chips; at most 256 in a slice")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning needs the TPU compiler: pip install 'deit_jax[plan]'")
    # No TPU is asked for its surroundings, and several plans may run side by side.
    os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    options = {"chip_config_name": CHIPS[kind].config} if CHIPS[kind].config != "default" else {}
    if slices > 1:
        options["num_slices"] = slices
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with quiet():
            return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--topology={topology}: no such slice ({first})") from error


@contextlib.contextmanager
def quiet():
    """Keep what libtpu writes to stderr, harmless, out of sight unless something fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except Exception as error:
            file.seek(0)
            error.add_note(file.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def data_size(config, classes: int, images: int) -> tuple[int, int]:
    """Return how many classes and training images there are: as given, known, or counted."""
    if classes and images:
        return classes, images
    known = KNOWN_DATA.get(config.data.source)
    if known is None:
        try:
            dataset = open_dataset(config.data)
        except UserError as error:
            raise UserError(f"{error}; or give --classes=N and --images=N") from error
        known = len(dataset.classes), len(dataset.train)
    return classes or known[0], images or known[1]


def abstract_teacher(config, num_classes: int):
    """Return a teacher and the shapes of its parameters, batch norm folded; no weights are read.

    (None, None) where the step does without, as a label tape answers for it.
    """
    if config.distill.kind == "none" or config.teacher.tape == "replay":
        return None, None
    data, size = config.data, config.teacher.image_size or config_lib.image_size(config.model)
    model = config_lib.build_model(config.teacher.model, num_classes, config.dtype)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    if "batch_stats" in variables:
        model = model.clone(folded=True)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
    dtype = config_lib.compute_dtype(config.dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), variables["params"])
    return Teacher(model, data.mean, data.std, data.mean, data.std, size), params


def lower_step(config, mesh, num_classes: int, num_images: int):
    """Return Trainer's step, lowered for the mesh, and its abstract arguments."""
    model = config_lib.build_model(config.model, num_classes, config.dtype)
    size, steps = config_lib.image_size(config.model), max(1, num_images // config.batch_size)
    tx = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, config.epochs, steps))
    init = functools.partial(
        init_state, model=model, image_size=size, tx=tx, ema_decay=config.optim.ema_decay
    )
    state = jax.eval_shape(init, jax.random.key(config.seed))
    places = sharding.state_shardings(mesh, state, model)
    teacher, params = abstract_teacher(config, num_classes)
    teacher_places = sharding.state_shardings(mesh, params, teacher and teacher.model)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), np.int32),
    }
    labels = np.zeros(config.batch_size, np.int32)
    for name, x in signal_of(config, labels, num_classes).items():
        batch[name] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    batch_places = dict.fromkeys(batch, sharding.batch_sharding(mesh))
    arguments = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        (state, params, batch),
        (places, teacher_places, batch_places),
    )
    recipe = Recipe.from_config(config, num_classes, mesh)
    notes = sharding.unsplit(mesh, state.params, model)
    return (
        jit_train_step(model, teacher, tx, recipe, mesh, places).lower(*arguments),
        arguments,
        notes,
    )


def plan(config, topology: str, classes: int = 0, images: int = 0) -> dict[str, Any]:
    """Compile the config's step for a TPU slice; return the figures, None where it does not fit.

    Raise UserError for a config that cannot be trained there.
    """
    kind, chips = parse_topology(topology)
    config = config.copy_and_resolve_references()
    devices = devices_of(topology, config.mesh.slices)
    config.dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    config_lib.validate(without_teacher_weights(config), len(devices))
    classes, images = data_size(config, classes, images)
    chips *= config.mesh.slices
    mesh = sharding.make_mesh(config.mesh, devices)
    lowered, arguments, notes = lower_step(config, mesh, classes, images)
    began, compiled, needed = time.perf_counter(), None, None
    try:
        with quiet():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        needed = used_bytes(str(error))
    result = {
        "config": config_lib.to_json(config),
        "topology": topology,
        "chips": chips,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "images_per_chip": config.batch_size / chips,
        "compile_s": time.perf_counter() - began,
        "notes": notes,
    }
    result |= memory(compiled, arguments, needed, CHIPS[kind])
    count = parts.micro_batches(config, mesh, classes)
    return result | speed(config, compiled, CHIPS[kind], chips, classes, images, count)


def used_bytes(message: str) -> int | None:
    """Return how much memory a program that does not fit would take, None if it is not said."""
    for pattern in USED:
        if match := re.search(pattern, message):
            return int(float(match[1]) * 1024 ** (" KMGT".index(match[2])))
    return None


def memory(compiled, arguments, needed: int | None, chip) -> dict[str, Any]:
    """Return `fits` and the bytes of a chip; `needed` is what an impossible program would take."""
    shards = (
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arguments)
    )
    argument, temp, peak = sum(shards), None, needed
    if compiled is not None:
        found = compiled.memory_analysis()
        argument, temp = found.argument_size_in_bytes, found.temp_size_in_bytes
        peak = hlo.peak_bytes(compiled)
    sizes = {"argument_bytes": argument, "temp_bytes": temp, "peak_bytes": peak}
    sizes = {k: v and v * chip.devices for k, v in sizes.items()} | {"hbm_bytes": chip.hbm_bytes}
    return {
        "fits": compiled is not None and sizes["peak_bytes"] <= chip.hbm_bytes,
        "per_chip": sizes,
    }


def speed(config, compiled, chip, chips, classes, images, micro_batches) -> dict[str, Any]:
    """Return operations, communication and estimated times of one step and of the whole run.

    The step is taken in so many micro-batches.
    """
    keys = ("flops_per_step", "collectives", "collective_counts", "estimated_cycles")
    keys += ("estimated_step_ms", "images_per_second_per_chip", "mfu", "hours", "not_estimated")
    analytic = flops_per_image(config, classes) * config.batch_size
    result = dict.fromkeys(keys) | {"analytic_flops_per_step": analytic}
    if compiled is None:
        return result
    cost = hlo.cost(compiled.as_text())
    seconds = cost.cycles / (chip.clock_ghz * 1e9)
    steps = optim.whole_steps(config.epochs, max(1, images // config.batch_size))
    return result | {
        # XLA counts a loop's body once, and all but the update is in the micro-batches' loop.
        "flops_per_step": compiled.cost_analysis()["flops"] * micro_batches * chips * chip.devices,
        "collectives": {kind: cost.bytes[kind] for kind in hlo.COLLECTIVES},
        "collective_counts": {kind: cost.counts[kind] for kind in hlo.COLLECTIVES},
        "estimated_cycles": cost.cycles,
        "estimated_step_ms": seconds * 1e3,
        "images_per_second_per_chip": config.batch_size / seconds / chips,
        "mfu": analytic / (seconds * chip.peak_tflops * 1e12 * chips),
        "hours": steps * seconds / 3600,
        "not_estimated": {
            "custom_calls": cost.custom_calls,
            "loops_of_unknown_length": cost.unknown_loops,
        },
    }


def alternatives(config, chips: int) -> dict[str, dict[str, Any]]:
    """Return changes of the config that need less memory, by the flags that make them.

    None of them changes the recipe but the last, half the batch.
    """
    remat, micro = {"model.remat": True}, {"optim.accum_steps": 2 * config.optim.accum_steps}
    changes, whole = [remat, micro], chips // (config.mesh.slices * config.mesh.tensor)
    if config.mesh.fsdp < whole:
        fsdp = {"mesh.data": -1, "mesh.fsdp": whole}
        changes += [fsdp, fsdp | remat]
    changes.append({"batch_size": config.batch_size // 2})
    return {" ".join(f"--config.{k}={v}" for k, v in c.items()): c for c in changes}


def sweep(config, topology: str, classes: int = 0, images: int = 0) -> list[dict[str, Any]]:
    """Return the plan of each alternative, or the reason why it is none."""
    devices, results = len(devices_of(topology, config.mesh.slices)), []
    for flags, changes in alternatives(config, devices).items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        log.info("compiling with %s", flags)
        try:
            result = plan(changed, topology, classes, images)
            result.pop("config")
        except UserError as error:
            result = {"error": str(error)}
        results.append({"change": flags, **result})
    return results


def main(argv: list[str]) -> None:
    """Run `deit plan`."""
    from absl import flags

    command = cli.Command("plan", PLAN_DOC)
    command.add_config(argv)
    own = {"flag_values": command.flags}
    flags.DEFINE_string("topology", "", "KIND:SIZE of the TPU slice, as in v5e:4x4", **own)
    flags.DEFINE_boolean("sweep", False, "plan less hungry variants of the config as well", **own)
    flags.DEFINE_integer("classes", 0, "number of classes, where the data is not here", 0, **own)
    flags.DEFINE_integer("images", 0, "number of training images, likewise", 0, **own)
    flags.DEFINE_string("out", "", "write the figures to this JSON file", **own)
    flags.DEFINE_boolean("json", False, "print one JSON object", **own)
    cli.no_words(command.parse(argv, required=("config", "topology")))
    values, config = command.flags, command.config
    jax.config.update("jax_platforms", "cpu")  # compiling needs no device, and must take none
    result = plan(config, values.topology, values.classes, values.images)
    if values.sweep:
        result["sweep"] = sweep(config, values.topology, values.classes, values.images)
    if values.out:
        try:
            metrics.write_json(Path(values.out), result)
        except OSError as error:
            raise UserError(f"--out={values.out}: cannot be written ({error.strerror})") from error
    if values.json:
        json.dump(result, sys.stdout)
        print()
        return
    print(report(result))
    if values.sweep:
        print(sweep_report(result["sweep"]))
    elif text := advice(result, list(alternatives(config, result["chips"]))):
        print(text)
