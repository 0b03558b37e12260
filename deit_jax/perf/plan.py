"""Needs of a training step on TPUs, found by compiling it for them here: `deit plan`."""

import contextlib
import importlib.util
import logging
import math
import os
import re
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from deit_jax.config.serialize import to_json
from deit_jax.data.sources.registry import open_dataset
from deit_jax.errors import UserError
from deit_jax.parallel import sharding
from deit_jax.perf import hlo_cost
from deit_jax.perf.chips import CHIPS, TPUS
from deit_jax.perf.flops import flops_per_image, teacher_flops_per_image
from deit_jax.perf.step_time import random_labels
from deit_jax.shapes import input_shape
from deit_jax.step.committee import shardings
from deit_jax.train.experiment import Experiment, sketch
from deit_jax.train.tape.session import stand_in

log = logging.getLogger("deit_jax")

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

    options: dict[str, Any] = {}
    if CHIPS[kind].config != "default":
        options["chip_config_name"] = CHIPS[kind].config
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


def data_size(data, classes: int, images: int) -> tuple[int, int]:
    """Return how many classes and training images there are: as given, known, or counted."""
    if classes and images:
        return classes, images
    known = KNOWN_DATA.get(data.source)
    if known is None:
        try:
            dataset = open_dataset(data)
        except UserError as error:
            raise UserError(f"{error}; or give --classes=N and --images=N") from error
        known = len(dataset.classes), len(dataset.train)
    return classes or known[0], images or known[1]


def lower_step(experiment: Experiment):
    """Return the step that a run would compile, lowered, and its abstract arguments."""
    teacher, params = experiment.abstract_teacher() or (None, None)
    batch_size = experiment.batch_size
    labels = random_labels(experiment, batch_size, np.random.default_rng(0))
    shape = input_shape(experiment.model, experiment.image_size, batch_size)
    batch = {"image": jax.ShapeDtypeStruct(shape, np.uint8)}
    known = {"label": labels, **stand_in(experiment, labels)}
    batch |= jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), known)
    places = (
        shardings(teacher, experiment.mesh, params),
        jax.tree.map(lambda _: sharding.batch_sharding(experiment.mesh), batch),
    )
    arguments = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (params, batch), places
    )
    arguments = (experiment.abstract_state, *arguments)
    return experiment.jit_step(teacher).lower(*arguments), arguments


def planned(config, topology: str, classes: int = 0, images: int = 0) -> Experiment:
    """Return what a config means on a TPU slice; raise UserError if it cannot be trained there."""
    parse_topology(topology)
    config = config.copy_and_resolve_references()
    devices = devices_of(topology, config.mesh.slices)
    config.dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    return sketch(config, lambda: data_size(config.data, classes, images), devices)


def plan(experiment: Experiment, topology: str) -> dict[str, Any]:
    """Compile a step for its slice; return the figures, None where it does not fit."""
    kind, chips = parse_topology(topology)
    config = experiment.config
    chips *= config.mesh.slices
    lowered, arguments = lower_step(experiment)
    began, compiled, needed = time.perf_counter(), None, None
    try:
        with quiet():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        needed = used_bytes(str(error))
    result = {
        "config": to_json(config),
        "topology": topology,
        "chips": chips,
        "mesh": dict(experiment.mesh.shape),
        "batch_size": config.batch_size,
        "images_per_chip": config.batch_size / chips,
        "compile_s": time.perf_counter() - began,
        "notes": experiment.unsplit(),
    }
    result |= memory(compiled, arguments, needed, CHIPS[kind])
    return result | speed(experiment, compiled, CHIPS[kind], chips)


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
        peak = hlo_cost.peak_bytes(compiled)
    sizes = {"argument_bytes": argument, "temp_bytes": temp, "peak_bytes": peak}
    sizes = {k: v and v * chip.devices for k, v in sizes.items()} | {"hbm_bytes": chip.hbm_bytes}
    return {
        "fits": compiled is not None and sizes["peak_bytes"] <= chip.hbm_bytes,
        "per_chip": sizes,
    }


def speed(experiment: Experiment, compiled, chip, chips: int) -> dict[str, Any]:
    """Return operations, communication and estimated times of one step and of the whole run."""
    keys = [
        *("flops_per_step", "collectives", "collective_counts", "estimated_cycles"),
        *("estimated_step_ms", "images_per_second_per_chip", "mfu", "hours", "not_estimated"),
    ]
    batch_size, steps = experiment.batch_size, experiment.total_steps
    analytic = flops_per_image(experiment) * batch_size
    result = dict.fromkeys(keys) | {"analytic_flops_per_step": analytic}
    if compiled is None:
        return result
    cost = hlo_cost.cost(compiled.as_text())
    seconds = cost.cycles / (chip.clock_ghz * 1e9)
    return result | {
        "flops_per_step": _compiled_flops(experiment, compiled, chips * chip.devices),
        "collectives": {kind: cost.bytes[kind] for kind in hlo_cost.COLLECTIVES},
        "collective_counts": {kind: cost.counts[kind] for kind in hlo_cost.COLLECTIVES},
        "estimated_cycles": cost.cycles,
        "estimated_step_ms": seconds * 1e3,
        "images_per_second_per_chip": batch_size / seconds / chips,
        "mfu": analytic / (seconds * chip.peak_tflops * 1e12 * chips),
        "hours": steps * seconds / 3600,
        "not_estimated": {
            "custom_calls": cost.custom_calls,
            "loops_of_unknown_length": cost.unknown_loops,
        },
    }


def _compiled_flops(experiment: Experiment, compiled, devices: int) -> float:
    """Return the operations of a whole step, of which XLA counts the body of each loop once.

    All but the update is in the micro-batches' loop or in the teacher's, which has as many turns as
    the teacher has parts; what is the teacher's of the sum is counted from its model.
    """
    settings = experiment.settings
    teacher = teacher_flops_per_image(experiment) * experiment.batch_size
    counted = compiled.cost_analysis()["flops"] * devices
    student = counted - teacher / settings.teacher_parts
    return student * settings.micro_batches + teacher


def alternatives(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return changes of the config that need less memory, by the flags that make them.

    None of them changes the recipe but the last, half the batch.
    """
    mesh, accum_steps = experiment.config.mesh, experiment.config.optim.accum_steps
    changes = [{"model.remat": True}, {"optim.accum_steps": 2 * accum_steps}]
    whole = experiment.mesh.size // (mesh.slices * mesh.tensor)
    if mesh.fsdp < whole:
        fsdp = {"mesh.data": -1, "mesh.fsdp": whole}
        changes += [fsdp, fsdp | {"model.remat": True}]
    changes.append({"batch_size": experiment.batch_size // 2})
    return {" ".join(f"--config.{k}={v}" for k, v in c.items()): c for c in changes}


def sweep(experiment: Experiment, topology: str) -> list[dict[str, Any]]:
    """Return the plan of each alternative, or the reason why it is none."""
    results = []
    for flags, changes in alternatives(experiment).items():
        log.info("compiling with %s", flags)
        try:
            result = plan(experiment.changed(changes), topology)
            result.pop("config")
        except UserError as error:
            result = {"error": str(error)}
        results.append({"change": flags, **result})
    return results
