"""Compare `deit predict` on a folder of JPEG files with `deit eval` on the same, and its memory.

    python -m benchmarks.predict [--images=10000] [--repeats=3] [--json=FILE]

Photographs of scikit-image and scikit-learn, cut and scaled as benchmarks/corpus.py does it, lie in
a folder, many times by hard links. The model is as small as one for 224 pixels can be: what is
timed is reading. Both commands run as processes, in turns; their rate is that of the images beyond
the first tenth, so that starting and compiling do not count. Memory is the process's largest, for a
tenth of the images and for all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import deit_jax
from benchmarks import corpus
from benchmarks import input as input_lib
from deit_jax.weights.convert import convert
from deit_jax.weights.fit import LoadedWeights, init_variables

FILES = 200  # of their own; the others are links to them
CLASSES = 6


def write_images(root: Path, count: int) -> None:
    """Write photographs of six classes."""
    photographs = sorted(corpus._from_pypi(), key=lambda photograph: photograph[0])
    for number in range(FILES):
        rng = np.random.default_rng([2021, number])
        encoded, _ = corpus._make(photographs[number % len(photographs)][1], rng)
        path = root / str(number % CLASSES) / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    for number in range(FILES, count):
        first = number % FILES
        path = root / str(first % CLASSES)
        os.link(path / f"{first:05d}.jpg", path / f"{number:05d}.jpg")


def write_weights(path: Path) -> None:
    """Write a transformer of one narrow block."""
    name = "deit_tiny_patch16_224"
    fields = {"patch_size": 32, "width": 24, "depth": 1}
    model = deit_jax.create_model(name, num_classes=CLASSES, **fields)
    opened = LoadedWeights(
        source="",
        format="",
        name=name,
        model=model,
        variables={"batch_stats": {}, **init_variables(model, 0)},
        classes=[str(i) for i in range(CLASSES)],
        image_size=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_ratio=0.875,
    )
    convert(opened, path)


# The kernel's own figure of a process counts what the one held that started it.
COMMAND = """
import re, sys
from deit_jax.__main__ import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


def timed(words: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and the most memory that it held, in MB."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-1000:]}")
    return time.perf_counter() - begin, int(done.stderr.split()[-1]) / 1024


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    given = parser.parse_args()
    few = given.images // 10
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_weights(root / "w.safetensors")
        for name, count in (("few", few), ("all", given.images)):
            write_images(root / name, count)
        weights = f"--weights={root / 'w.safetensors'}"
        wholly = ["--config.data.eval_split=.", "--config.train.eval_batch_size=64"]
        rows: dict[str, list[float]] = {"predict": [], "eval": [], "predict_mb": [], "few_mb": []}
        for _ in range(given.repeats):
            for kind in ("predict", "eval"):
                seconds, most = {}, {}
                for name in ("few", "all"):
                    source = f"--config.data.source=folder:{root / name}"
                    words = {
                        "predict": [
                            "predict",
                            weights,
                            f"--out={root / 'o.csv'}",
                            str(root / name),
                        ],
                        "eval": ["eval", weights, "--config=configs/base.py", source, *wholly],
                    }[kind]
                    seconds[name], most[name] = timed(words)
                rows[kind].append((given.images - few) / (seconds["all"] - seconds["few"]))
                if kind == "predict":
                    rows["predict_mb"].append(most["all"])
                    rows["few_mb"].append(most["few"])
    result = {
        "machine": input_lib._machine(),
        "images": given.images,
        "predict_images_per_second": statistics.median(rows["predict"]),
        "eval_images_per_second": statistics.median(rows["eval"]),
        "rate_of_eval": statistics.median(
            a / b for a, b in zip(rows["predict"], rows["eval"], strict=True)
        ),
        "megabytes": statistics.median(rows["predict_mb"]),
        "megabytes_of_a_tenth": statistics.median(rows["few_mb"]),
    }
    print(json.dumps(result, indent=2))
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
