"""What a label tape of ImageNet takes on disk, and what recording one takes of a step.

    python benchmarks/tape.py

prints one JSON object a kind of tape, of random labels, so that real ones take no more, scaled to
the 375,300 steps of 300 epochs at a batch of 1024; then the quickstart's step on this machine, its
teacher alive, with and without recording: medians over turns that alternate.
"""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from deit_jax.cli import huge_pages, platforms  # noqa: E402
from deit_jax.configs import quickstart  # noqa: E402
from deit_jax.data.sources.registry import open_dataset  # noqa: E402
from deit_jax.perf.step_time import random_batch  # noqa: E402
from deit_jax.step.distill.base import Layout  # noqa: E402
from deit_jax.train.experiment import resolve  # noqa: E402
from deit_jax.train.loop import Trainer  # noqa: E402
from deit_jax.train.tape.layout import checksum  # noqa: E402
from deit_jax.train.tape.session import NoTape, TapeRecorder  # noqa: E402
from deit_jax.train.tape.tape import CHUNK_STEPS, Tape  # noqa: E402

BATCH, CLASSES, STEPS = 1024, 1000, 300 * 1251
TURNS, TURN_STEPS = 9, 40


def answers(layout: Layout, copies: int, rng) -> dict[str, np.ndarray]:
    """Return a chunk of answers drawn at random, each given to so many neighbours in the batch."""
    shape = (CHUNK_STEPS, -(-BATCH // copies))
    if layout.kind == "hard":
        labels = np.repeat(rng.integers(0, CLASSES, shape), copies, 1)[:, :BATCH]
        return {"labels": labels.astype(np.int16)}
    top = (*shape, layout.top_k)
    return {
        "indices": rng.integers(0, CLASSES, top).astype(np.int16),
        "logits": -np.sort(rng.exponential(3, top)).astype(np.float16),
        "rest": -rng.exponential(1, shape).astype(np.float16),
    }


def measure(kind: str, chunks: int, copies: int, folder: Path) -> dict:
    """Write some chunks; return sizes in GB, and seconds to write and to read a chunk."""
    layout, rng = Layout(kind, BATCH, CLASSES, 16), np.random.default_rng(0)
    given = {"distill.kind": kind, "batch_size": BATCH, "data.num_classes": CLASSES}
    tape, raw, write_s = Tape.create(folder, layout, given, chunks * CHUNK_STEPS), 0, 0.0
    for first in range(0, len(tape), CHUNK_STEPS):
        parts = answers(layout, copies, rng)
        sums = [checksum({k: v[i] for k, v in parts.items()}) for i in range(CHUNK_STEPS)]
        began = time.perf_counter()
        for future in tape.write(first, parts):
            future.result()
        write_s += time.perf_counter() - began
        tape.claim(np.arange(first, first + CHUNK_STEPS), 0, sums)
        raw += sum(part.nbytes for part in parts.values())
    files = [p for p in folder.rglob("*") if p.is_file()]
    began = time.perf_counter()
    Tape.open(folder).target(0, range(BATCH))
    scale = STEPS / len(tape) / 1e9
    return {
        "kind": kind,
        "equal_neighbours": copies,
        "raw_gb": round(raw * scale, 2),
        "disk_gb": round(sum(p.stat().st_size for p in files) * scale, 2),
        "write_chunk_s": round(write_s / chunks, 3),
        "read_chunk_s": round(time.perf_counter() - began, 3),
    }


def trainer(folder: Path, kind: str, record: bool) -> Trainer:
    """Return the quickstart's run with a teacher of random weights."""
    config = quickstart.get_config()
    config.distill.kind = kind
    dataset, tape = open_dataset(config.data), NoTape()
    if record:
        classes = len(dataset.classes)
        layout = Layout(kind, config.batch_size, classes, min(classes, config.teacher.tape_top_k))
        given = {"distill.kind": kind, "batch_size": config.batch_size, "data.num_classes": classes}
        tape = TapeRecorder(Tape.create(folder / "tape", layout, given, 1), layout)
    experiment = resolve(config, len(dataset.classes), len(dataset.train))
    return Trainer(experiment, folder, dataset, experiment.random_teacher(), tape=tape)


def turn(run: Trainer, batch, first: int) -> float:
    """Return the seconds a step takes, what was recorded brought to disk at the end."""
    in_flight, began = None, time.perf_counter()
    for number in range(first, first + TURN_STEPS):
        run.state, values = run.step(run.state, run.teacher_params, batch)
        if in_flight:  # as in training, fetched while the next step runs
            finish(run, *in_flight)
        in_flight = (number, values)
    finish(run, *in_flight)
    run.tape.flush()
    return (time.perf_counter() - began) / TURN_STEPS


def finish(run: Trainer, number: int, values) -> None:
    """Fetch a step's metrics and record what is to be recorded, as Trainer does."""
    values = jax.device_get(values)
    run.tape.record(number, values.pop("teacher_target", None))


def recording(kind: str) -> dict:
    """Return the milliseconds of a step with and without a tape that records it."""
    with contextlib.ExitStack() as stack:
        runs, times = {}, {"off": [], "record": []}
        for name in times:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            runs[name] = trainer(folder, kind, record=name == "record")
            stack.callback(runs[name].checkpointer.close)
        runs["record"].tape.begin(0, (TURNS + 1) * TURN_STEPS, 0)
        batch = random_batch(runs["off"].experiment)
        for number in range(TURNS + 1):  # the first compiles
            for name, run in runs.items():
                times[name].append(turn(run, batch, number * TURN_STEPS))
    found = {name: 1e3 * np.array(all_times[1:]) for name, all_times in times.items()}
    return {
        "kind": kind,
        "step_ms": round(float(np.median(found["off"])), 3),
        "recording_ms": round(float(np.median(found["record"])), 3),
        "median_ratio": round(float(np.median(found["record"] / found["off"])), 4),
        "ratio_spread": np.percentile(found["record"] / found["off"], (10, 90)).round(3).tolist(),
    }


if __name__ == "__main__":
    platforms.choose()
    huge_pages.restart()
    for case in (("hard", 4, 1), ("hard", 4, 3), ("soft", 1, 1)):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(*case, Path(folder) / "tape")), flush=True)
    for kind in ("hard", "soft"):
        print(json.dumps(recording(kind)), flush=True)
