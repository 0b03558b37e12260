"""Train for an hour and see whether anything grows: memory, open files, threads, the step's time.

    python benchmarks/soak.py [--minutes=60] [--saves-a-minute=1] [--workdir=DIR] [--json=FILE]

A distilled student on scikit-learn's digits with the whole recipe, saving and evaluating about once
a minute: every part of the loop runs again and again. What else the machine does shows in the
step's time, less in its CPU time. The first fifth is warm-up; growth is that of the median of the
last fifth over the median of the second one.

Every save costs 273 bytes an array for good, 40 kB here: KvStore.Spec.to_json of TensorStore
(0.1.78 to 0.1.86), which Orbax calls once an array, does not give back what it returns.
--saves-a-minute=9 shows it.
"""

import argparse
import datetime
import itertools
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

from deit_jax.configs import quickstart  # noqa: E402
from deit_jax.data.order import whole_steps  # noqa: E402
from deit_jax.errors import Interrupted  # noqa: E402
from deit_jax.parallel.signals import StopRequest  # noqa: E402
from deit_jax.storage import read_lines  # noqa: E402
from deit_jax.train import run  # noqa: E402

SAMPLE_SECONDS = 5.0
STEPS_AN_EPOCH = 14  # the quickstart's
STEPS_A_MINUTE = 630  # on one core of this machine's kind; only how often to save depends on it


class Counting(StopRequest):
    """Also counts the steps."""

    steps = 0

    def agreed(self, mesh) -> bool:
        """Return what StopRequest does; called once a step."""
        self.steps += 1
        return super().agreed(mesh)


def get_config(saves_a_minute: float = 1.0):
    """Return quickstart's config with the augmentation of the paper and no end in sight."""
    c = quickstart.get_config()
    c.epochs, c.teacher.epochs = 1e6, 0.2
    c.augment.auto, c.augment.repeats, c.mixing.prob = "rand-m9-mstd0.5-inc1", 3, 1.0
    c.model.width, c.model.depth = 48, 2
    c.train.log_every_steps = 10
    epochs = STEPS_A_MINUTE / STEPS_AN_EPOCH / saves_a_minute
    c.train.save_every_epochs = c.train.eval_every_epochs = epochs
    return c


def sample(steps: int) -> dict[str, float]:
    """Return what this process holds now, MiB of memory, files, threads, and has used, CPU s."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "steps": steps,
        "cpu_s": time.process_time(),
        "resident_mib": int(fields["VmRSS"].split()[0]) / 1024,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": int(fields["Threads"]),
    }


def watch(stop: Counting, seconds: float, samples: list) -> None:
    """Take samples for so long, then ask the run to stop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(SAMPLE_SECONDS)
        samples.append(sample(stop.steps))
    stop.name = "the end of the soak"


def growth(values: list[float]) -> dict[str, float]:
    """Return the median of the second and of the last fifth, and the growth in percent."""
    fifth = len(values) // 5
    early, late = (statistics.median(v) for v in (values[fifth : 2 * fifth], values[-fifth:]))
    percent = round(100 * (late / early - 1), 2)
    return {"early": round(early, 3), "late": round(late, 3), "growth_percent": percent}


def cpu_ms(samples: list) -> list[float]:
    """Return the CPU time of a step, saves and evaluations included, minute by minute."""
    marks = samples[:: round(60 / SAMPLE_SECONDS)]
    return [
        1000 * (b["cpu_s"] - a["cpu_s"]) / max(1, b["steps"] - a["steps"])
        for a, b in itertools.pairwise(marks)
    ]


def soak(minutes: float, saves_a_minute: float, workdir: Path) -> dict:
    """Train so long in `workdir`; return the figures."""
    before, samples, stop = set(threading.enumerate()), [], Counting()
    config = get_config(saves_a_minute)
    watcher = threading.Thread(target=watch, args=(stop, 60 * minutes, samples), daemon=True)
    watcher.start()
    try:
        run.train(config, workdir, stop)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
    watcher.join()
    time.sleep(1)
    left = sorted(t.name for t in set(threading.enumerate()) - before)
    rates = read_lines(workdir / "timing.jsonl")
    step_ms = [1000 * config.batch_size / r["images_per_second"] for r in rates]
    figures = {k: growth([s[k] for s in samples]) for k in ("resident_mib", "open_files")}
    return {
        "minutes": minutes,
        "steps": rates[-1]["step"],
        "saves": rates[-1]["step"] // whole_steps(config.train.save_every_epochs, STEPS_AN_EPOCH),
        "samples": len(samples),
        **figures,
        "threads": growth([s["threads"] for s in samples]),
        "step_ms": growth(step_ms),
        "step_cpu_ms": growth(cpu_ms(samples)),
        "python_threads_left": left,
        "resident_mib_each_minute": [round(s["resident_mib"], 1) for s in samples[::12]],
    }


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--saves-a-minute", type=float, default=1.0)
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
        **soak(args.minutes, args.saves_a_minute, workdir),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
