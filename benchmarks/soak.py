"""Train for an hour and see whether anything grows: memory, open files, threads, the step's time.

    python benchmarks/soak.py [--minutes=60] [--workdir=DIR] [--json=FILE]

A distilled student on scikit-learn's digits with the whole recipe, saving and evaluating several
times a minute: every part of the loop runs thousands of times. What the machine does meanwhile
shows in the step's time, so leave it alone. The first fifth is warm-up; growth is that of the
median of the last fifth over the median of the second one.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["JAX_PLATFORMS"] = "cpu"

from configs import quickstart  # noqa: E402
from deit_jax import metrics, train  # noqa: E402
from deit_jax.errors import Interrupted  # noqa: E402
from deit_jax.interrupt import StopRequest  # noqa: E402

SAMPLE_SECONDS = 5.0


def get_config():
    """Return quickstart's config with the augmentation of the paper and no end in sight."""
    c = quickstart.get_config()
    c.epochs, c.teacher.epochs = 1e6, 0.2
    c.augment.auto, c.augment.repeats, c.mixing.prob = "rand-m9-mstd0.5-inc1", 3, 1.0
    c.model.width, c.model.depth = 48, 2
    c.train.log_every_steps = 10
    c.train.save_every_epochs, c.train.eval_every_epochs = 5.0, 10.0
    return c


def sample() -> dict[str, float]:
    """Return what this process holds now: MiB of resident memory, open files, threads."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "time": time.monotonic(),
        "resident_mib": int(fields["VmRSS"].split()[0]) / 1024,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": int(fields["Threads"]),
    }


def watch(stop: StopRequest, seconds: float, samples: list) -> None:
    """Take samples for so long, then ask the run to stop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(SAMPLE_SECONDS)
        samples.append(sample())
    stop.name = "the end of the soak"


def growth(values: list[float]) -> dict[str, float]:
    """Return the median of the second and of the last fifth, and the growth in percent."""
    fifth = len(values) // 5
    early, late = (statistics.median(v) for v in (values[fifth : 2 * fifth], values[-fifth:]))
    percent = round(100 * (late / early - 1), 2)
    return {"early": round(early, 3), "late": round(late, 3), "growth_percent": percent}


def soak(minutes: float, workdir: Path) -> dict:
    """Train so long in `workdir`; return the figures."""
    before, samples, stop = set(threading.enumerate()), [], StopRequest()
    watcher = threading.Thread(target=watch, args=(stop, 60 * minutes, samples), daemon=True)
    watcher.start()
    try:
        train.train(get_config(), workdir, stop)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
    watcher.join()
    time.sleep(1)
    left = sorted(t.name for t in set(threading.enumerate()) - before)
    rates = metrics.read_lines(workdir / "timing.jsonl")
    step_ms = [1000 * get_config().batch_size / r["images_per_second"] for r in rates]
    figures = {k: growth([s[k] for s in samples]) for k in ("resident_mib", "open_files")}
    return {
        "minutes": minutes,
        "steps": rates[-1]["step"],
        "saves": rates[-1]["step"] // (5 * 14),
        "samples": len(samples),
        **figures,
        "threads": growth([s["threads"] for s in samples]),
        "step_ms": growth(step_ms),
        "python_threads_left": left,
        "resident_mib_each_minute": [round(s["resident_mib"], 1) for s in samples[::12]],
    }


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    workdir = args.workdir or Path(tempfile.mkdtemp()) / "soak"
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{len(os.sched_getaffinity(0))} used",
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "orbax-checkpoint": metadata.version("orbax-checkpoint"),
        **soak(args.minutes, workdir),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
