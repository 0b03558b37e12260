"""Compare the input pipeline with timm's and tf.data's on one core, in one process and run.

    python benchmarks/corpus.py FOLDER
    python benchmarks/input.py FOLDER [--repeats=9] [--images=192] [--threads] [--json=FILE]

Every variant makes batches of 224 x 224 uint8 images by DeiT's recipe from the same JPEG files in
memory: random resized crop (bicubic, antialiased), flip, RandAugment m9 mstd0.5 inc1. The variants
take turns in random order, so that the machine's moods meet all alike; what counts is a variant's
ratio to timm in the same turn, and of those the median. --threads adds two threads against one,
which needs two cores at rest.
"""

import argparse
import datetime
import io
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from deit_jax.configs import base  # noqa: E402
from deit_jax.data import decoders as decoders_lib  # noqa: E402
from deit_jax.data.batches import TrainBatches  # noqa: E402
from deit_jax.data.loader import load  # noqa: E402
from deit_jax.data.order import EpochOrder  # noqa: E402

TF_DATA = "tf.data, TF RandAugment"
SIZE, BATCH, RANDAUGMENT = 224, 96, "rand-m9-mstd0.5-inc1"
PACKAGES = ["numpy", "pillow", "opencv-python-headless", "simplejpeg", "kornia-rs"]
PACKAGES += ["cykooz-resizer", "grain", "timm", "torch", "torchvision"]
PACKAGES += ["tensorflow-cpu", "tf-models-official"]


class Memory:
    """The files of a folder, read beforehand: the disk is not what is measured."""

    def __init__(self, folder: str):
        self.paths = sorted(str(path) for path in Path(folder).rglob("*.jpg"))
        self.files = [Path(path).read_bytes() for path in self.paths]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.files[index], "label": 0}

    def describe(self, index: int) -> str:
        """Return the file's path."""
        return self.paths[index]


# Peers: functions of a number of images that make so many.
def timm_like(source: Memory):
    """timm's training transforms on Pillow, each copy decoded anew as its RASampler has it."""
    transform = _timm_transform()
    order = np.random.default_rng(0)

    def run(images: int) -> None:
        batch = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
        for row in range(images):
            encoded = source.files[order.integers(len(source))]
            image = transform(Image.open(io.BytesIO(encoded)).convert("RGB"))
            batch[row % BATCH] = np.asarray(image)

    return run


def _timm_transform():
    sys.path[:0] = [str(ROOT / "tests")]
    import timm_reference

    timm_reference.import_timm()
    from timm.data import auto_augment, create_transform

    # Pillow 13 refuses posterize to 0 bits, which timm asks for at the highest level.
    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **kw: posterize(
        image, max(1, bits), **kw
    )
    transform = create_transform(
        SIZE,
        is_training=True,
        auto_augment=RANDAUGMENT,
        interpolation="bicubic",
        color_jitter=None,
        re_prob=0.0,
        normalize=False,
    )
    transform.transforms = transform.transforms[:-1]  # its last step makes a tensor of the image
    return transform


def tf_data(source: Memory):
    """tf.data at the same quality: accurate DCT, antialiased bicubic, timm's RandAugment in TF."""
    import tensorflow as tf
    from official.vision.ops.augment import RandAugment

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    # Without the level's deviation, with which its posterize fails.
    randaugment = RandAugment(2, magnitude=9, prob_to_apply=0.5, exclude_ops=["Cutout"])

    def view(encoded):
        shape = tf.io.extract_jpeg_shape(encoded)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros([1, 0, 4]),
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(
            encoded, window, channels=3, dct_method="INTEGER_ACCURATE"
        )
        image = tf.image.resize(image, (SIZE, SIZE), "bicubic", antialias=True)
        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return randaugment.distort(tf.image.random_flip_left_right(image))

    files = tf.data.Dataset.from_tensor_slices(source.files).shuffle(len(source), 0).repeat()
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    batches = files.map(view).batch(BATCH).prefetch(1).with_options(options)

    def run(images: int) -> None:
        for batch in batches.take(images // BATCH):  # not more, in the others' turns
            batch.numpy()

    return run


def ours(source: Memory, decoder: str, repeats: int, threads: int = 1, batch: int = BATCH):
    """Make batches as `deit train` gets them: through the loader and its threads."""
    order = EpochOrder(len(source), batch, repeats, 0)
    config, state = base.get_config().augment, {"step": 0}
    config.auto = RANDAUGMENT
    batches = TrainBatches(source, order, config, SIZE, range(batch), decoder)

    def run(images: int) -> None:
        start, state["step"] = state["step"], state["step"] + -(-images // batch)
        for _ in load(batches, start, state["step"], threads, 2):
            pass

    return run


class Nothing(TrainBatches):
    """Batches of which nothing is computed, only a row written; what remains is the loader."""

    def _read(self, slot: int, scratch):
        return "", np.zeros((SIZE, SIZE, 3), np.uint8), 0, None

    def _view(self, image, rng, resize_):
        return image


def loader(source: Memory, direct: bool):
    """Load batches of nothing, through the loader's threads or by a plain loop."""
    order = EpochOrder(len(source), BATCH, 3, 0)
    rows, config = range(BATCH), base.get_config().augment
    batches = Nothing(source, order, config, SIZE, rows, "pillow")

    def plain(images: int) -> None:
        batch, row = batches.empty(), np.zeros((SIZE, SIZE, 3), np.uint8)
        for number in range(images):
            batch["image"][number % BATCH] = row

    def threaded(images: int) -> None:
        for _ in load(batches, 0, images // BATCH, 1, 8):
            pass

    return plain if direct else threaded


def measure(variants: dict, repeats: int, images: int) -> dict[str, list[float]]:
    """Return for each variant its microseconds an image, one for each turn."""
    for run in variants.values():
        run(BATCH)  # warm up
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name in random.sample(list(variants), len(variants)):
            began = time.perf_counter()
            variants[name](images)
            times[name].append((time.perf_counter() - began) / images * 1e6)
    return times


def one_core(source: Memory, repeats: int, images: int) -> list[dict]:
    """Return the rows of the table that need one core."""
    decoders = [name for name in reversed(decoders_lib.available()) if name != "pillow"]
    variants, targets = {}, {}
    for copies, wanted in ((3, {"fast": 3.0, "portable": 2.4}), (1, {"fast": 1.8})):
        for decoder in decoders:
            name = f"deit_jax {decoder}, {copies} {'copies' if copies > 1 else 'copy'}"
            variants[name] = ours(source, decoder, copies)
            targets[name] = wanted.get(decoder)
    variants["timm on Pillow"] = timm_like(source)
    if _installed("tf-models-official"):
        variants[TF_DATA] = tf_data(source)
    times = measure(variants, repeats, images)
    rows = []
    for name in variants:
        row = {"name": name, "us_per_image": statistics.median(times[name])}
        row["images_per_second"] = 1e6 / row["us_per_image"]
        row["times_timm"] = _ratio(times["timm on Pillow"], times[name])
        if TF_DATA in times:
            row["times_tf_data"] = _ratio(times[TF_DATA], times[name])
        row["target_times_timm"] = targets.get(name)
        rows.append(row)
    return rows


def _ratio(theirs: list[float], ours_: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours_, strict=True))


def overhead(source: Memory, repeats: int) -> float:
    """Return the loader's microseconds an image beyond a plain loop's."""
    variants = {"plain": loader(source, True), "loader": loader(source, False)}
    times = measure(variants, repeats, 20 * BATCH)
    return statistics.median(a - b for a, b in zip(times["loader"], times["plain"], strict=True))


def two_cores(source: Memory, repeats: int, images: int) -> dict[str, float]:
    """Return how many times faster than one thread are two, and two processes of one thread.

    Processes share nothing, so theirs is what the machine itself grants.
    """
    os.sched_setaffinity(0, range(2))
    decoder = decoders_lib.available()[-1]
    one, two = (ours(source, decoder, 3, n, 2 * BATCH) for n in (1, 2))
    pipes = []
    for _ in range(2):
        here, there = multiprocessing.Pipe()
        run = ours(source, decoder, 3, 1, 2 * BATCH)
        multiprocessing.get_context("fork").Process(
            target=_serve, args=(run, there), daemon=True
        ).start()
        pipes.append(here)

    def processes(number: int) -> None:
        for pipe in pipes:
            pipe.send(number // 2)
        for pipe in pipes:
            pipe.recv()

    times = measure({"one": one, "two": two, "processes": processes}, repeats, 4 * images)
    return {name: _ratio(times["one"], times[name]) for name in ("two", "processes")}


def _serve(run, pipe) -> None:
    while True:
        run(pipe.recv())
        pipe.send(None)


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "packages": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
    }


def show(result: dict) -> None:
    """Print the table, ours first."""
    print(f"{result['machine']['cpu']}, one core; {result['photographs']} photographs")
    print(f"{'':32}{'us/image':>9}{'images/s':>10}{'x timm':>8}{'target':>8}{'x tf.data':>11}")
    for row in result["one_core"]:
        target, tf_ratio = row["target_times_timm"], row.get("times_tf_data")
        print(
            f"{row['name']:32}{row['us_per_image']:9.0f}{row['images_per_second']:10.0f}"
            f"{row['times_timm']:8.2f}{f'{target:.1f}' if target else '':>8}"
            f"{f'{tf_ratio:.2f}' if tf_ratio else '':>11}"
        )
    print("the target against tf.data, with 3 copies, is 3")
    print(f"loader beyond a plain loop: {result['loader_us']:.0f} us an image (target 60)")
    if result["two_threads"]:
        print(f"two threads against one: {result['two_threads']:.2f} x (target 1.8)")
        print(f"two processes against one thread: {result['two_processes']:.2f} x")


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--images", type=int, default=2 * BATCH)
    parser.add_argument("--threads", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    source = Memory(args.folder)
    two = two_cores(source, args.repeats, args.images) if args.threads else {}
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    result = {
        "machine": _machine(),
        "photographs": len(source),
        "mean_bytes": statistics.mean(map(len, source.files)),
        "one_core": one_core(source, args.repeats, args.images),
        "loader_us": overhead(source, args.repeats),
        "two_threads": two.get("two"),
        "two_processes": two.get("processes"),
    }
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
