"""Kill a training again and again, and compare what it ends with to a run that nobody touched.

    python -m tests.faults.driver [--kills=28] [--seed=0] [--json=FILE]

The run is a real process: digits, a distilled student, mixing, repeated augmentation, RandAugment,
erasing and a moving average; it saves every fourth step and evaluates every tenth. A third of the
kills (SIGKILL) fall while a checkpoint is being written, a third while the run evaluates, the rest
at random moments, the start-up included.
"""

import argparse
import collections
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS_PER_EPOCH = 5  # of 180 images in batches of 32
EVALUATE, SAVE = 10, 4  # every so many steps
WORDS = [
    f"--config={ROOT}/configs/quickstart.py",
    "--config.batch_size=32",
    "--config.data.eval_fraction=0.9",
    "--config.data.threads=1",
    "--config.teacher.epochs=0.2",
    "--config.teacher.model.widths=(8, 16)",
    "--config.teacher.model.depths=(1, 1)",
    "--config.teacher.model.stem_width=8",
    "--config.model.image_size=16",
    "--config.model.patch_size=4",
    "--config.model.width=24",
    "--config.model.depth=2",
    "--config.model.drop_path=0.1",
    "--config.augment.auto=rand-m9-mstd0.5-inc1",
    "--config.augment.repeats=2",
    "--config.augment.flip_prob=0.5",
    "--config.mixing.prob=1.0",
    "--config.mixing.group_size=8",
    "--config.train.log_every_steps=1",
    f"--config.train.save_every_epochs={SAVE / STEPS_PER_EPOCH}",
    f"--config.train.eval_every_epochs={EVALUATE / STEPS_PER_EPOCH}",
]


def environment(cache: Path) -> dict[str, str]:
    """Return that of one CPU device which keeps its compiled programs: a restart takes seconds."""
    return {
        **{k: v for k, v in os.environ.items() if k not in ("JAX_ENABLE_COMPILATION_CACHE",)},
        # One thread: how sums are split must not depend on the cores that happen to be free.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false "
        "--xla_backend_optimization_level=0",  # most of a test's time is compiling
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def start(workdir: Path, cache: Path, steps: int, *more: str) -> subprocess.Popen:
    """Start `deit train` in the background; its output goes to the file log_of says."""
    place = PLACES.get(workdir, (workdir, {}))
    words = [*WORDS, f"--config.epochs={steps / STEPS_PER_EPOCH}", f"--workdir={place[0]}", *more]
    with log_of(workdir).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deit_jax", "train", *words],
            cwd=ROOT,
            env={**environment(cache), **place[1]},
            stdout=log,
            stderr=log,
        )


# Of a workdir that is a folder of an emulator's: what it is called, and the environment to ask it.
PLACES: dict[Path, tuple[str, dict[str, str]]] = {}


def log_of(workdir: Path) -> Path:
    """Return the file of a run's output: beside it, or beside the emulator's folder."""
    return (workdir.parent if workdir in PLACES else workdir).with_suffix(".log")


def finish(process: subprocess.Popen, workdir: Path, timeout: float = 300) -> None:
    """Wait for a run to end well."""
    if process.wait(timeout):
        raise RuntimeError(log_of(workdir).read_text()[-3000:])


def records(workdir: Path) -> list[dict]:
    """Return what metrics.jsonl holds now, but for a line being written."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def saving(workdir: Path) -> bool:
    """Return whether a checkpoint is being written; in a bucket it has its name before its sums."""
    there = list((workdir / "checkpoints").glob("*"))
    begun = [p for p in there if p.name.isdigit() and not (p / "sha256.json").exists()]
    return any("tmp" in p.name for p in there) or any(
        file.is_file() for p in begun for file in p.rglob("*")
    )


def evaluating(workdir: Path) -> bool:
    """Return whether the last step has its loss recorded and its evaluation due, but not yet."""
    last = records(workdir)[-1:]
    return bool(last) and "loss" in last[0] and last[0]["step"] % EVALUATE == 0


def where(workdir: Path) -> str:
    """Return what a run that was just killed was doing."""
    busy = [f.__name__ for f in (saving, evaluating) if f(workdir)]
    if busy:
        return " + ".join(busy)
    if not (workdir / "config.json").exists() or not (workdir / "checkpoints").exists():
        return "starting"
    started = [r for r in history(workdir) if r["event"] == "start"]
    return "training" if started and started[-1]["pid"] == where.pid else "starting"


where.pid = 0


def history(workdir: Path) -> list[dict]:
    """Return the run's history."""
    path = workdir / "history.jsonl"
    return [json.loads(x) for x in path.read_text().split("\n")[:-1]] if path.exists() else []


def kill_once(workdir: Path, cache: Path, steps: int, how: str, rng: random.Random) -> dict | None:
    """Start the run and kill it as asked; return where it was, None if it ended before."""
    began, process = time.monotonic(), start(workdir, cache, steps)
    where.pid = process.pid
    ready = {"saving": saving, "evaluating": evaluating}.get(how)
    first = len(history(workdir))
    # Random moments: some of the start-up, most of the steps after it.
    end = rng.uniform(0, 3) if rng.random() < 0.15 else None
    delay = rng.uniform(0, 0.03) if ready else rng.uniform(0, 2.0)
    while process.poll() is None:
        if end is not None and not ready:
            if time.monotonic() - began > end:
                break
        elif len(history(workdir)) > first and (ready is None or ready(workdir)):
            time.sleep(delay)
            break
        time.sleep(0.002)
    if process.poll() is not None:
        finish(process, workdir)
        return None
    process.kill()
    process.wait()
    place, last = where(workdir), records(workdir)[-1:]
    seconds = round(time.monotonic() - began, 1)
    return {"aim": how, "hit": place, "step": last[0]["step"] if last else 0, "seconds": seconds}


def torment(
    workdir: Path, cache: Path, steps: int, kills: int, seed: int, at_least: int | None = None
) -> list[dict]:
    """Kill a run so often, each time at another moment, then let it finish.

    A fast machine may finish it before; RuntimeError unless it was killed `at_least` so often.
    """
    rng, done = random.Random(seed), []
    aims = ["saving", "evaluating", "any"]
    while len(done) < kills:
        hit = kill_once(workdir, cache, steps, aims[len(done) % 3], rng)
        if hit is None and at_least is not None and len(done) >= at_least:
            break
        if hit is None:
            raise RuntimeError(f"{workdir}: finished after {len(done)} kills; make it longer")
        done.append(hit)
    finish(start(workdir, cache, steps), workdir)
    return done


def state(workdir: Path):
    """Return all arrays of the newest checkpoint by path: parameters, optimizer, average, …"""
    whole = (workdir / "checkpoints").glob("[0-9]*/sha256.json")
    newest = max(int(p.parent.name) for p in whole)
    directory = (workdir / "checkpoints" / str(newest) / "default").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            checkpointer.metadata(directory).item_metadata.tree,
        )
        tree = checkpointer.restore(directory, restore_args=as_numpy)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def differences(a: Path, b: Path) -> list[str]:
    """Return what differs between two finished runs: state, metrics and results, bit for bit."""
    found, (x, y) = [], (state(a), state(b))
    found += sorted(x.keys() ^ y.keys())
    found += [k for k in x.keys() & y.keys() if x[k].tobytes() != y[k].tobytes()]
    found += [
        name
        for name in ("metrics.jsonl", "results.json")
        if (a / name).read_bytes() != (b / name).read_bytes()
    ]
    steps = [r["step"] for r in records(b) if "loss" in r]
    if steps != list(range(1, len(steps) + 1)):
        found.append("steps out of order")
    return found


def main() -> None:
    """Run the long version and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = long_version(args.folder, args.kills, args.seed)
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)
    sys.exit(bool(result["differences"]))


def long_version(folder: Path, kills: int, seed: int) -> dict:
    """Return the figures of one tormented run and its comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = 25 * kills
    whole, killed = folder / "whole", folder / "killed"
    finish(start(whole, folder / "cache", steps), whole, 900)
    hits = torment(killed, folder / "cache", steps, kills, seed)
    places = collections.Counter(place for hit in hits for place in hit["hit"].split(" + "))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax {metadata.version('jax')}, "
        f"orbax {metadata.version('orbax-checkpoint')}",
        "seed": seed,
        "steps": steps,
        "kills": len(hits),
        "where": dict(places),
        "arrays_compared": len(state(whole)),
        "differences": differences(whole, killed),
        "each": hits,
    }


if __name__ == "__main__":
    main()
