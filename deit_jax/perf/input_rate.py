"""Speed of the input pipeline on this machine, and a device's need for images: `--input-only`."""

import contextlib
import dataclasses
import itertools
import re
import time
from typing import Any

import cv2
import numpy as np

from deit_jax.data import decode
from deit_jax.data.augment import make_augment
from deit_jax.data.decode import PLAIN, Reading
from deit_jax.data.decoders import choose
from deit_jax.data.loader import usable_cores, useful_threads
from deit_jax.data.order import example_rng
from deit_jax.data.sources.base import Dataset
from deit_jax.data.view import random_view, reading_of
from deit_jax.errors import UserError
from deit_jax.perf.chips import CHIPS
from deit_jax.perf.flops import flops_per_image
from deit_jax.shapes import Size
from deit_jax.train.experiment import Experiment

STAGES = ("read", "decode", "crop", "augment", "wait")


def parse_device(text: str) -> tuple[str, int]:
    """Return the kind and number of devices that `v5e-8` or `h100x8` means; raise UserError."""
    match = re.fullmatch(r"([a-z]+\d+[a-z]*?)(?:[-x](\d+))?", text.lower())
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


def stages(experiment: Experiment, dataset: Dataset, seconds: float) -> dict[str, float]:
    """Return µs per produced image of each stage, one after the other in this thread.

    Reading and decoding are shared by the copies of an image, and so counted by share. At least
    one image of each copy is timed, and 16 before that are not.
    """
    cv2.setNumThreads(0)  # as the pipeline does
    data, augment, size = experiment.data, experiment.augment, experiment.image_size
    decoder, apply = (
        choose(data.decoder),
        make_augment(augment.auto, augment.color_jitter, data.channels),
    )
    reading = reading_of(data)
    indices, clock, times = (
        experiment.order.images(dataset.train),
        time.perf_counter,
        dict.fromkeys(STAGES[:4], 0.0),
    )
    warm_up, images, start = 16 * augment.repeats, 0, clock()
    for position in itertools.count(0, augment.repeats):
        index = int(indices[position // augment.repeats])
        name = dataset.train.describe(index)
        t0 = clock()
        example = dataset.train[index]
        t1 = clock()
        try:
            pixels = decode.read(example["image"], name, decoder, None, reading)
        except UserError:
            if not data.skip_unreadable:
                raise
            continue
        resize = decode.resize_of(example["image"], decoder, reading)
        t2 = clock()
        spent = [t1 - t0, t2 - t1, 0.0, 0.0]
        for copy in range(augment.repeats):
            rng = example_rng(experiment.order.seed, position + copy)
            t0 = clock()
            view = crop(pixels, augment, size, rng, resize, reading)
            t1 = clock()
            apply(view, rng)
            spent[2], spent[3] = spent[2] + t1 - t0, spent[3] + clock() - t1
        if position >= warm_up:
            times = {k: times[k] + s for k, s in zip(times, spent, strict=True)}
            images += augment.repeats
        if images and clock() - start > seconds:
            return {k: v / images * 1e6 for k, v in times.items()}
    raise AssertionError


def crop(
    pixels: np.ndarray, augment, size: Size, rng, resize, reading: Reading = PLAIN
) -> np.ndarray:
    """Crop, resize and flip an image as the config's `augment` says."""
    view = random_view(pixels, size, augment, rng, resize, reading)
    return view[:, ::-1] if rng.random() < augment.flip_prob else view


def input_rate(experiment: Experiment, dataset: Dataset, seconds: float) -> float:
    """Return images per second of the real pipeline, nobody waiting for a model."""
    # Short batches, so that one does not take longer than the whole measurement.
    size = min(experiment.batch_size, 128 * experiment.order.repeats)
    order = dataclasses.replace(experiment.order, batch_size=size)
    short = dataclasses.replace(experiment, order=order)
    with contextlib.closing(short.loaded(short.batches(dataset, range(size)), 0, 2**31)) as loader:
        next(loader)  # starts the threads
        began, times = time.perf_counter(), []
        while not times or times[-1] < seconds:
            next(loader)
            times.append(time.perf_counter() - began)
    return len(times) * size / times[-1]


def measure(
    experiment: Experiment,
    dataset: Dataset,
    seconds: float,
    device: str = "v5e-8",
    mfu: float = 0.0,
) -> dict[str, Any]:
    """Measure the input for some seconds; return rates, stages and what the model needs.

    `stages_us` is the time a core has for one image, by what it does with it; "wait" is the rest:
    the loader, memory, threads waiting for each other.
    """
    parse_device(device)
    cores = usable_cores()
    work = experiment.batches(dataset).work_us()
    threads = min(experiment.data.threads or useful_threads(work, cores), cores)
    stages_us = stages(experiment, dataset, seconds / 3)
    rate = input_rate(experiment, dataset, 2 * seconds / 3)
    stages_us["wait"] = max(0.0, threads / rate * 1e6 - sum(stages_us.values()))
    flops = flops_per_image(experiment)
    needed = need(flops, device, mfu)
    return {
        "images_per_second": rate,
        "images_per_second_per_core": rate / threads,
        "cores": threads,
        "decoder": str(choose(experiment.data.decoder)),
        "stages_us": stages_us,
        "need": needed | {"cores": needed["images_per_second"] / (rate / threads)},
    }


def report(result: dict[str, Any]) -> str:
    """Return what `measure` found, in lines."""
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
