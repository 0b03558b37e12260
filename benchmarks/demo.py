"""How long `deit demo` takes to answer: from the upload of a picture to the HTML of the page.

    python -m benchmarks.demo [--pictures=12] [--json=FILE]

The server is `deit demo` itself in a process of its own, with random weights of 1000 classes at
224 pixels; the client asks over HTTP, one new picture after the other. "start" is from the command
to the page, with nothing compiled before, "first" the first picture's time, "median" and "slowest"
those of the others. "photograph" is a JPEG file of 50 megapixels, "memory_mb" the most memory that
the server ever had.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from deit_jax.data.decode import PLAIN  # noqa: E402
from deit_jax.models.registry import create_model, get_spec  # noqa: E402
from deit_jax.weights.convert import convert  # noqa: E402
from deit_jax.weights.fit import LoadedWeights, default_classes, init_variables  # noqa: E402
from tests.demo_server import served  # noqa: E402

MODELS = ("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224")
TEACHER = "regnety_040"
PHOTOGRAPH = (8660, 5774)


def write_weights(name: str, folder: Path) -> Path:
    """Write random weights of a model; return their file."""
    model, said, path = create_model(name, 1000), get_spec(name), folder / f"{name}.safetensors"
    known = {"mean": said.mean, "std": said.std, "crop_ratio": said.crop_ratio, "reading": PLAIN}
    known |= {"image_size": 224, "classes": default_classes(1000), "source": "", "format": ""}
    variables = {"batch_stats": {}, **init_variables(model, 0)}
    convert(LoadedWeights(name=name, model=model, variables=variables, **known), path)
    return path


def write_pictures(count: int, folder: Path) -> list[Path]:
    """Write JPEG files of 640 x 480 pixels, each another."""
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.jpg" for i in range(count)]
    for file in files:
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def measure(words: list[str], files: list[Path], large: Path, folder: Path) -> dict[str, float]:
    """Return the seconds of a server with these words, and its memory."""
    folder.mkdir()
    began = time.perf_counter()
    fresh = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": ""}
    with served(folder, "demo", *words, "--port=0", environment=fresh) as page:
        start = time.perf_counter() - began
        times = [timed(page, file) for file in files]
        photograph = timed(page, large)
        status = Path(f"/proc/{page.process.pid}/status").read_text()
    memory = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    found = {
        "start": start,
        "first": times[0],
        "median": statistics.median(times[1:]),
        "slowest": max(times[1:]),
        "photograph": photograph,
    }
    return {k: round(v, 3) for k, v in found.items()} | {"memory_mb": round(memory)}


def timed(page, file: Path) -> float:
    """Return the seconds until a picture is answered."""
    began = time.perf_counter()
    html = page.look(file)[0]
    assert 'class="answers"' in html, html
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deit-demo-") as name:
        folder = Path(name)
        files = write_pictures(args.pictures, folder)
        large = folder / "large.jpg"
        picture = Image.open(files[0]).resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
        picture.save(large, quality=90)
        teacher = write_weights(TEACHER, folder)
        seconds = {}
        for number, model in enumerate(MODELS):
            words = [f"--weights={write_weights(model, folder)}"]
            seconds[model] = measure(words, files, large, folder / f"{number}")
            words += [f"--teacher={teacher}"]
            both = f"{model}, teacher {TEACHER}"
            seconds[both] = measure(words, files, large, folder / f"{number} with teacher")
    result = {
        "command": "python -m benchmarks.demo",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, "
        f"gradio {metadata.version('gradio')}",
        "pictures": args.pictures,
        "seconds": seconds,
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
