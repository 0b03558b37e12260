"""Compare the input pipeline fed by hf: with folder:, the same photographs, on one core.

    python -m benchmarks.hf_input [--repeats=15] [--images=192] [--count=240] [--json=FILE]

Photographs of scikit-image and scikit-learn, cut and scaled as benchmarks/corpus.py does it, lie in
a folder, in a data set written by `save_to_disk`, and in parquet files of the hub's layout, opened
through Arrow. Each makes batches by DeiT's recipe through the loader, in turns of random order;
what counts is the median of the ratio of a turn's times. The files are in the cache of the system.
A single copy of each image is the hardest on a source: with three, a file is read once for them.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import corpus
from benchmarks import input as input_lib
from deit_jax.configs import base
from deit_jax.data import decoders as decoders_lib
from deit_jax.data.sources.registry import open_dataset

PACKAGES = ("datasets", "pyarrow")


def write(root: Path, count: int) -> None:
    """Write the photographs in three forms: folder, saved, hub."""
    import datasets

    photographs = sorted(corpus._from_pypi(), key=lambda photograph: photograph[0])
    names = [name for name, _ in photographs]
    rows = {"image": [], "label": []}
    for number in range(count):  # in the order of the folder, so that the same are held out
        label = number * len(photographs) // count
        rng = np.random.default_rng([2021, number])
        encoded, _ = corpus._make(photographs[label][1], rng)
        path = root / "folder" / names[label] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
        rows["image"].append({"bytes": encoded, "path": path.name})
        rows["label"].append(label)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    table = datasets.Dataset.from_dict(rows, datasets.Features(features))
    table.save_to_disk(str(root / "saved"))
    table.to_parquet(str(root / "hub" / "data" / "train-00000-of-00001.parquet"))


def open_train(source: str):
    """Return the images to train on, a twentieth held out."""
    data = base.get_config().data
    data.source, data.eval_fraction = source, 0.05
    return open_dataset(data).train


def read(source):
    """Read images, without decoding them."""

    def run(images: int) -> None:
        for number in range(images):
            source[number % len(source)]

    return run


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--images", type=int, default=2 * input_lib.BATCH)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--json")
    args = parser.parse_args()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    with tempfile.TemporaryDirectory() as name:
        import datasets

        root = Path(name)
        datasets.config.HF_DATASETS_CACHE = root / "cache"
        datasets.disable_progress_bars()
        write(root, args.count)
        forms = {"folder": "folder:{}/folder", "hf saved": "hf:{}/saved", "hf hub": "hf:{}/hub"}
        # The very same images in the same order: only where they lie differs.
        sources = {form: open_train(source.format(root)) for form, source in forms.items()}
        first, *others = sources.values()
        for other in others:
            assert [first[i] for i in range(len(first))] == [other[i] for i in range(len(other))]
        decoder = decoders_lib.available()[-1]
        kinds = {
            "1 copy": lambda source: input_lib.ours(source, decoder, 1),
            "3 copies": lambda source: input_lib.ours(source, decoder, 3),
            "reading alone": read,
        }
        rows = []
        for kind, make in kinds.items():
            variants = {form: make(source) for form, source in sources.items()}
            times = input_lib.measure(variants, args.repeats, args.images)
            for form, own in times.items():
                ratio = input_lib._ratio(times["folder"], own)
                row = {"kind": kind, "source": form, "us_per_image": statistics.median(own)}
                rows.append(row | {"rate_of_folder": ratio})
        machine = input_lib._machine()
    machine["packages"] |= {name: input_lib.metadata.version(name) for name in PACKAGES}
    print(f"{machine['cpu']}, one core; {args.count} photographs, {args.repeats} turns")
    for row in rows:
        print(
            f"{row['kind']:14}{row['source']:10}{row['us_per_image']:9.1f} us/image, "
            f"{row['rate_of_folder']:.3f} of folder's rate"
        )
    if args.json:
        result = {"machine": machine, "photographs": args.count, "decoder": decoder, "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
