"""What a label tape of ImageNet takes on disk: random labels, so that real ones take no more.

    python benchmarks/tape.py

prints one JSON object a kind of tape, scaled to the 375,300 steps of 300 epochs at a batch of 1024.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np

from deit_jax.tape import CHUNK_STEPS, Layout, Tape, checksum

BATCH, CLASSES, STEPS = 1024, 1000, 300 * 1251


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
    Tape.open(folder).signal(0, range(BATCH))
    scale = STEPS / len(tape) / 1e9
    return {
        "kind": kind,
        "equal_neighbours": copies,
        "raw_gb": round(raw * scale, 2),
        "disk_gb": round(sum(p.stat().st_size for p in files) * scale, 2),
        "write_chunk_s": round(write_s / chunks, 3),
        "read_chunk_s": round(time.perf_counter() - began, 3),
    }


if __name__ == "__main__":
    for case in (("hard", 4, 1), ("hard", 4, 3), ("soft", 1, 1)):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(*case, Path(folder) / "tape")), flush=True)
