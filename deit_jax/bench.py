"""How fast the input pipeline and the training step are on this machine: `deit bench`."""

import contextlib
import itertools
import json
import logging
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

from deit_jax import cli, sharding
from deit_jax import config as config_lib
from deit_jax import teacher as teacher_lib
from deit_jax.chips import CHIPS, device_of
from deit_jax.data import decode, pipeline
from deit_jax.data.augment import make_augment
from deit_jax.data.resize import choose, resize_pillow
from deit_jax.data.sources import ArraySource, Dataset, open_dataset
from deit_jax.errors import UserError
from deit_jax.inspect_data import train_batches
from deit_jax.train import Trainer
from deit_jax.weights import folded

log = logging.getLogger("deit_jax")

BENCH_DOC = """usage: deit bench --config=FILE[:ARGS] [--input-only [--device=v5e-8]] [--seconds=10]

Measure the training step on the devices at hand, fed with random images. With --input-only, measure
instead how fast the config's images can be loaded, where the time goes, and how that compares with
what the config's model needs on a device.

  deit bench --config=configs/quickstart.py
  deit bench --config=configs/deit.py:variant=small --input-only --device=h100x8"""
STAGES = ("read", "decode", "crop", "augment", "wait")
UNKNOWN_CLASSES = 1000


def flops_per_image(config, num_classes: int) -> float:
    """Return the floating-point operations that one training example takes.

    6 per multiply-accumulate of the student (2 forward, 4 backward), 2 of the frozen teacher;
    recomputation is not counted.
    """
    size = config_lib.image_size(config.model)
    flops = 3 * _forward_flops(config.model, num_classes, size)
    if config.distill.kind != "none":
        size = config.teacher.image_size or size
        flops += _forward_flops(config.teacher.model, num_classes, size)
    return flops


def _forward_flops(model_config, num_classes: int, size: int) -> float:
    model = config_lib.build_model(model_config, num_classes)
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    lowered = jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, images)
    return lowered.cost_analysis()["flops"]


def parse_device(text: str) -> tuple[str, int]:
    """Return the kind and number of devices that `v5e-8` or `h100x8` means; raise UserError."""
    match = re.fullmatch(r"([a-z]+\d+[a-z]?)(?:[-x](\d+))?", text.lower())
    kind, count = (match[1], int(match[2] or 1)) if match else ("", 0)
    if kind not in CHIPS or count < 1:
        raise UserError(f"--device={text}: give one of {', '.join(CHIPS)}, as in v5e-8")
    return kind, count


def assumed_mfu(flops: float) -> float:
    """Return the share of the peak that a model of this size is assumed to reach."""
    # A guess: small matrices use less of a chip. 6 x 2 and 6 x 8 GMAC lie between Ti, S and B.
    return 0.2 if flops < 12e9 else 0.3 if flops < 48e9 else 0.4


def need(flops: float, device: str, mfu: float) -> dict[str, Any]:
    """Return how many images a second a device can use, at an assumed share of its peak."""
    kind, count = parse_device(device)
    mfu = mfu or assumed_mfu(flops)
    rate = CHIPS[kind].peak_tflops * 1e12 * count * mfu / flops
    return {"device": f"{kind}-{count}", "assumed_mfu": mfu, "images_per_second": rate}


def stages(config, dataset: Dataset, seconds: float) -> dict[str, float]:
    """Return µs per produced image of each stage, one after the other in this thread.

    Reading and decoding are shared by the copies of an image, and so counted by share. At least
    one image of each copy is timed, and 16 before that are not.
    """
    cv2.setNumThreads(0)  # as the pipeline does
    data, augment, size = config.data, config.augment, config_lib.image_size(config.model)
    order = pipeline.EpochOrder(len(dataset.train), config.batch_size, augment.repeats, config.seed)
    decoder, apply = choose(data.decoder), make_augment(augment.auto, augment.color_jitter)
    indices, clock, times = order.shuffled(), time.perf_counter, dict.fromkeys(STAGES[:4], 0.0)
    warm_up, images, start = 16 * augment.repeats, 0, clock()
    for position in itertools.count(0, augment.repeats):
        index = int(indices[position // augment.repeats])
        t0 = clock()
        example = dataset.train[index]
        t1 = clock()
        try:
            pixels = decode.read(example["image"], dataset.train.describe(index), decoder)
        except UserError:
            if not data.skip_unreadable:
                raise
            continue
        resize = resize_pillow if isinstance(example["image"], np.ndarray) else decoder.resize
        t2 = clock()
        spent = [t1 - t0, t2 - t1, 0.0, 0.0]
        for copy in range(augment.repeats):
            rng = pipeline.example_rng(config.seed, position + copy)
            t0 = clock()
            view = crop(pixels, augment, size, rng, resize)
            t1 = clock()
            apply(view, rng)
            spent[2], spent[3] = spent[2] + t1 - t0, spent[3] + clock() - t1
        if position >= warm_up:
            times = {k: times[k] + s for k, s in zip(times, spent, strict=True)}
            images += augment.repeats
        if images and clock() - start > seconds:
            return {k: v / images * 1e6 for k, v in times.items()}
    raise AssertionError


def crop(pixels: np.ndarray, augment, size: int, rng, resize) -> np.ndarray:
    """Crop, resize and flip an image as the config's `augment` says."""
    if augment.crop == "simple":
        view = decode.simple_random_crop(pixels, size, rng, resize)
    else:
        height, width, _ = pixels.shape
        box = decode.random_box(width, height, rng, augment.crop_scale, augment.crop_ratio)
        view = decode.resized_crop(pixels, box, size, resize)
    return view[:, ::-1] if rng.random() < augment.flip_prob else view


def input_rate(config, dataset: Dataset, seconds: float, threads: int) -> float:
    """Return images per second of the real pipeline, nobody waiting for a model."""
    batches = train_batches(config, dataset, range(config.batch_size))
    loader = pipeline.load(batches, 0, 2**31, threads, config.data.prefetch_batches)
    with contextlib.closing(loader):
        next(loader)  # starts the threads
        began, times = time.perf_counter(), []
        while not times or times[-1] < seconds:
            next(loader)
            times.append(time.perf_counter() - began)
    return len(times) * config.batch_size / times[-1]


def bench_input(config, seconds: float, device: str = "v5e-8", mfu: float = 0.0) -> dict[str, Any]:
    """Measure the input for some seconds; return rates, stages and what the model needs.

    `stages_us` is the time a core has for one image, by what it does with it; "wait" is the rest:
    the loader, memory, threads waiting for each other.
    """
    parse_device(device)
    dataset = open_dataset(config.data)
    cores = pipeline.usable_cores()
    threads = min(config.data.threads or cores, cores)
    stages_us = stages(config, dataset, seconds / 3)
    # Short batches, so that one does not take longer than the whole measurement.
    config = config.copy_and_resolve_references()
    config.batch_size = min(config.batch_size, 128 * config.augment.repeats)
    rate = input_rate(config, dataset, 2 * seconds / 3, config.data.threads)
    stages_us["wait"] = max(0.0, threads / rate * 1e6 - sum(stages_us.values()))
    flops = flops_per_image(config, len(dataset.classes))
    needed = need(flops, device, mfu)
    return {
        "images_per_second": rate,
        "images_per_second_per_core": rate / threads,
        "cores": threads,
        "decoder": str(choose(config.data.decoder)),
        "stages_us": stages_us,
        "need": needed | {"cores": needed["images_per_second"] / (rate / threads)},
    }


def synthetic(config) -> Dataset:
    """Return random images in as many classes as the config's data has, or 1000 without it."""
    try:
        classes = open_dataset(config.data).classes
    except UserError as error:
        log.info("random images in %d classes, since %s", UNKNOWN_CLASSES, error)
        classes = [str(i) for i in range(UNKNOWN_CLASSES)]
    images = np.zeros((config.batch_size, 1, 1, 3), np.uint8)
    source = ArraySource("random", images, np.zeros(config.batch_size, np.int32))
    return Dataset(source, source, classes)


def random_teacher(config, num_classes: int):
    """Return what load_teacher would, with random weights: as fast as trained ones."""
    if config.distill.kind == "none":
        return None
    model_config, data = config.teacher.model, config.data
    size = config.teacher.image_size or config_lib.image_size(config.model)
    dtype = config_lib.compute_dtype(config.dtype)
    model = config_lib.build_model(model_config, num_classes, config.dtype)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, size, size, 3), np.float32))
    model, params = folded(model, variables)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return teacher_lib.Teacher(model, data.mean, data.std, data.mean, data.std, size), params


def bench_step(config, seconds: float) -> dict[str, Any]:
    """Compile and time the training step; return the median of its ms, and the rate.

    The batch is on the devices already. `mfu` is None where the device's peak is not known,
    `peak_bytes` (of the fullest device) where the backend does not tell.
    """
    config_lib.validate(without_teacher_weights(config), jax.device_count())
    dataset = synthetic(config)
    teacher = random_teacher(config, len(dataset.classes))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), dataset, teacher)
        try:
            batch = _random_batch(config, len(dataset.classes), trainer.mesh)
            compile_s, times = _time_steps(trainer, batch, seconds)
        finally:
            trainer.checkpointer.close()
    step_s, kind = statistics.median(times), jax.devices()[0].device_kind
    flops = flops_per_image(config, len(dataset.classes)) * config.batch_size
    chip = CHIPS.get(device_of(kind))
    # JAX's devices are whole chips but for tpu7x, of which it makes two.
    peak = chip and chip.peak_tflops / chip.devices
    used = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    return {
        "device": kind,
        "devices": jax.device_count(),
        "batch_size": config.batch_size,
        "steps": len(times),
        "step_ms": step_s * 1e3,
        "images_per_second": config.batch_size / step_s,
        "compile_s": compile_s,
        "flops_per_step": flops,
        "mfu": peak and flops / step_s / (peak * 1e12 * jax.device_count()),
        "peak_bytes": max((u for u in used if u), default=None),
    }


def without_teacher_weights(config):
    config = config.copy_and_resolve_references()
    if config.distill.kind != "none" and not config.teacher.weights:
        config.teacher.epochs = 1.0  # stands for the weights that a bench does not need
    config.init.required = False
    return config


def _random_batch(config, num_classes: int, mesh) -> dict[str, jax.Array]:
    share = len(sharding.local_rows(mesh, config.batch_size))
    rng, size = np.random.default_rng(0), config_lib.image_size(config.model)
    batch = {
        "image": rng.integers(0, 256, (share, size, size, 3), np.uint8),
        "label": rng.integers(0, num_classes, share, np.int32),
    }
    return sharding.to_devices(batch, mesh, config.batch_size)


def _time_steps(trainer: Trainer, batch, seconds: float) -> tuple[float, list[float]]:
    """Return the seconds that compiling takes, and those of two or more steps after a first."""
    began = time.perf_counter()
    step = trainer._step.lower(trainer.state, trainer.teacher_params, batch).compile()
    compile_s, state, times = time.perf_counter() - began, trainer.state, []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        state, values = step(state, trainer.teacher_params, batch)
        jax.block_until_ready((state, values))
        times.append(time.perf_counter() - start)
    return compile_s, times[1:]


def input_report(result: dict[str, Any]) -> str:
    """Return what bench_input found, in lines."""
    needed, us = result["need"], result["stages_us"]
    return "\n".join(
        [
            f"input: {result['images_per_second']:.0f} images/s on {result['cores']} core(s), "
            f"{result['images_per_second_per_core']:.0f} images/s per core ({result['decoder']})",
            "µs per image and core: " + ", ".join(f"{k} {us[k]:.0f}" for k in STAGES),
            f"{needed['device']} needs about {needed['images_per_second']:.0f} images/s at an "
            f"assumed {needed['assumed_mfu']:.0%} of its peak: {needed['cores']:.0f} such cores",
        ]
    )


def step_report(result: dict[str, Any]) -> str:
    """Return what bench_step found, in lines."""
    memory, mfu = result["peak_bytes"], result["mfu"]
    return "\n".join(
        [
            f"step: {result['step_ms']:.1f} ms, {result['images_per_second']:.0f} images/s (batch "
            f"{result['batch_size']} on {result['devices']} x {result['device']}, median of "
            f"{result['steps']} steps)",
            f"compiling: {result['compile_s']:.1f} s; "
            f"peak memory: {'not told' if memory is None else f'{memory / 1e9:.2f} GB'}; "
            f"share of the peak: {'not known' if mfu is None else f'{mfu:.1%}'}",
        ]
    )


def main(argv: list[str]) -> None:
    """Run `deit bench`."""
    from absl import flags

    command = cli.Command("bench", BENCH_DOC)
    command.add_config(argv)
    own = {"flag_values": command.flags}
    flags.DEFINE_boolean("input_only", False, "measure the input pipeline instead", **own)
    flags.DEFINE_float("seconds", 10.0, "how long to measure", 0.0, **own)
    flags.DEFINE_string("device", "v5e-8", "KIND-NUMBER to feed, with --input-only", **own)
    flags.DEFINE_float("mfu", 0.0, "its assumed share of the peak; 0 = by the model", 0, 1, **own)
    flags.DEFINE_boolean("json", False, "print one JSON object", **own)
    cli.no_words(command.parse(argv, required=("config",)))
    config, values = command.config, command.flags
    if values.input_only:
        config_lib.validate(without_teacher_weights(config), num_devices=1)
        result, report = (
            bench_input(config, values.seconds, values.device, values.mfu),
            input_report,
        )
    else:
        result, report = bench_step(config, values.seconds), step_report
    if values.json:
        json.dump(result, sys.stdout)
        print()
    else:
        print(report(result))
