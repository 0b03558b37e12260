"""The training step and the forward pass on one GPU, beside timm's in PyTorch and a plain Flax ViT.

    python -m benchmarks.gpu [--part=train,forward,plain] [--minutes=8.5] [--out=FILE.json]
    python -m benchmarks.gpu --toy --out=FILE.json         the same code at toy size on a CPU
    python -m benchmarks.gpu --table --out=FILE.json       print what a file holds, measure nothing

Parts: `train` is DeiT distilled from a RegNetY-16GF (teacher forward, argmax, student forward, hard
distillation, backward, AdamW); `forward` the distilled student's prediction at 224 and 384 pixels
(the throughput column of the paper's table 5); `plain` a ViT with one class token and no teacher.
All compute in bfloat16 over float32 weights in training, bfloat16 weights in prediction and in the
teacher, on uint8 images of random noise that are on the GPU already.

Peers: `ours` is the step of `deit train` but for the moving average: it also erases, mixes and
checks its loss, which no peer does. `eager` and `compile` are timm under autocast, without and with
torch.compile: channels-last teacher, timm's scaled-dot-product attention, fused AdamW. `flax` is a
ViT of flax.linen's own layers, as in big_vision.

Every row (part, model, batch, peer, turn) is a process of its own with a time limit, one after the
other, peers in turns, and is written down when it ends: start it again and it goes on with what is
missing; rows that failed are kept with their reason (--retry). Needs jax, flax, optax, orbax,
ml_collections, einops and jaxtyping, of PyTorch's side torch, torchvision, timm and pytest.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
PEERS = {
    "train": ("ours", "eager", "compile"),
    "forward": ("ours", "eager", "compile"),
    "plain": ("ours", "flax"),
}
BATCHES = {"train": (128, 512), "forward": (256,), "plain": (256,)}
MODELS = {  # and their image sizes
    "train": (("small", 224), ("base", 224), ("tiny", 224)),
    "forward": (("small", 224), ("base", 224), ("tiny", 224), ("base", 384)),
    "plain": (("small", 224), ("base", 224), ("tiny", 224)),
}
WINDOWS, WARM_UP = 5, 3


def rows(parts: list[str], batches: list[int], turns: int, toy: bool) -> dict[str, dict]:
    """Return every row by its key, peers next to each other."""
    found = {}
    for turn, part in itertools.product(range(1, turns + 1), parts):
        models = (("tiny", 32),) if toy else MODELS[part]
        sizes = (8,) if toy else batches or BATCHES[part]
        for batch, (model, size), peer in itertools.product(sizes, models, PEERS[part]):
            key = f"{part}/{model}/{size}/{batch}/{peer}/{turn}"
            row = {"part": part, "model": model, "image_size": size, "batch": batch, "peer": peer}
            found[key] = row | {"turn": turn, "toy": toy}
    return found


def measure(row: dict, seconds: float) -> dict:
    """Measure one row in this process: ms of a step in each of five windows, and the rest."""
    if row["peer"] in ("ours", "flax"):
        from benchmarks import gpu_jax as framework
    else:
        from benchmarks import gpu_torch as framework
    step, wait, facts = framework.build(row)

    def window(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return (time.perf_counter() - began) / steps

    first = window(1)
    steps = max(2, math.ceil(seconds / min(window(1) for _ in range(WARM_UP))))
    times = [window(steps) for _ in range(WINDOWS)]
    rate, known = row["batch"] / median(times), facts()
    if known.get("peak_tflops"):
        known["mfu"] = rate * known["flops_per_image"] / (known["peak_tflops"] * 1e12)
    return {
        **row,
        "first_step_s": first,
        "steps_per_window": steps,
        "windows_ms": [1e3 * t for t in times],
        "images_per_second": rate,
        **known,
    }


def run_row(row: dict, seconds: float, limit: float) -> dict:
    """Measure a row in a process of its own; return its figures, or {"error"}."""
    words = [f"--row={json.dumps(row)}", f"--seconds={seconds}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *words],
        cwd=ROOT,
        # Only one process holds the GPU at a time, so that JAX may take it whole.
        env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with torch.compile's workers
        process.communicate()
        return {**row, "error": f"took longer than {limit:.0f} s"}
    if process.returncode == 0:
        return json.loads(out.splitlines()[-1])
    if any(word in err for word in ("RESOURCE_EXHAUSTED", "OutOfMemoryError")):
        return {**row, "error": "out of memory"}
    return {**row, "error": (err.strip().splitlines() or [f"exit {process.returncode}"])[-1]}


def table(done: dict[str, dict]) -> str:
    """Return the rows as Markdown, one table a part, ours against each peer in the same turn."""
    lines = []
    for part, peers in PEERS.items():
        mine = [row for row in done.values() if row["part"] == part]
        cases = dict.fromkeys((r["model"], r["image_size"], r["batch"]) for r in mine)
        if not cases:
            continue
        others = [p for p in peers if p != "ours"]
        head = ["model", "px", "batch", *(f"{p} (images/s)" for p in peers)]
        head += [*(f"ours / {p}" for p in others), "ours: share of the peak"]
        head += [f"{p} (GB)" for p in peers]
        lines += [f"{part}:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for case in cases:
            same = [r for r in mine if (r["model"], r["image_size"], r["batch"]) == case]
            cells = [*case, *(_rate(same, p) for p in peers)]
            cells += [*(_ratio(same, p) for p in others), _share(same)]
            cells += [_middle(same, p, "peak_bytes", 1e9, ".1f") for p in peers]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def _rate(same: list[dict], peer: str) -> str:
    errors = [r["error"] for r in same if r["peer"] == peer and "error" in r]
    return errors[0] if errors else _middle(same, peer, "images_per_second", 1, ".0f")


def _middle(same: list[dict], peer: str, key: str, unit: float, form: str) -> str:
    values = [r[key] / unit for r in same if r["peer"] == peer and r.get(key)]
    return format(median(values), form) if values else "-"


def _ratio(same: list[dict], peer: str) -> str:
    rates = {(r["peer"], r["turn"]): r.get("images_per_second") for r in same}
    turns = sorted({r["turn"] for r in same})
    pairs = [(rates.get(("ours", t)), rates.get((peer, t))) for t in turns]
    ratios = [a / b for a, b in pairs if a and b]
    return f"{median(ratios):.2f}" if ratios else "-"


def _share(same: list[dict]) -> str:
    shares = [r["mfu"] for r in same if r["peer"] == "ours" and r.get("mfu")]
    return f"{median(shares):.1%}" if shares else "-"


class Results:
    """The file of what was measured, on one device."""

    def __init__(self, path: Path):
        self.path = path
        self.saved = json.loads(path.read_text()) if path.exists() else {"rows": {}}

    def add(self, key: str, row: dict) -> None:
        """Write a row down; raise SystemExit if it comes from another device than the others."""
        versions, device = row.pop("versions", {}), row.pop("device", None)
        known = self.saved.setdefault("device", device)
        if known is None:
            self.saved["device"] = device
        elif device not in (None, known):
            raise SystemExit(f"{self.path} is of a {known}, this is a {device}; give another --out")
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        self.saved |= {"date": today, "python": platform.python_version()}
        self.saved["versions"] = self.saved.get("versions", {}) | versions
        self.saved["rows"][key] = row
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.saved, indent=1) + "\n")
        os.replace(temporary, self.path)

    def has(self, key: str, retry: bool) -> bool:
        """Return whether a row need not be measured."""
        row = self.saved["rows"].get(key)
        return row is not None and not (retry and "error" in row)


def parse() -> argparse.Namespace:
    """Read the command line."""
    day = datetime.datetime.now(datetime.UTC).date()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/gpu-{day}.json")
    parser.add_argument("--part", default=",".join(PEERS), help="some of train, forward, plain")
    parser.add_argument("--peers", default="", help="only these, in every part")
    parser.add_argument("--batches", default="", help="as 64,256,1024, in every part")
    parser.add_argument("--turns", type=int, default=1, help="how often to go through all rows")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one window; a row has five")
    parser.add_argument("--minutes", type=float, default=8.5, help="end after so many")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that a row may take")
    parser.add_argument("--retry", action="store_true", help="measure rows that failed again")
    parser.add_argument("--toy", action="store_true", help="tiny models, to try the code")
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = options.part.split(",")
    if unknown := set(options.parts) - set(PEERS):
        parser.error(f"--part: {', '.join(sorted(unknown))}: choose from {', '.join(PEERS)}")
    return options


def main() -> None:
    """Measure what is missing, as far as the time goes, and print the table."""
    options = parse()
    if options.row:
        print(json.dumps(measure(json.loads(options.row), options.seconds)))
        return
    results, end = Results(options.out), time.monotonic() + 60 * options.minutes
    batches = [int(n) for n in options.batches.split(",") if n]
    planned = rows(options.parts, batches, options.turns, options.toy)
    peers = options.peers.split(",") if options.peers else None
    wanted = {k: row for k, row in planned.items() if not peers or row["peer"] in peers}
    missing = {} if options.table else wanted
    for key, row in missing.items():
        if results.has(key, options.retry):
            continue
        left = end - time.monotonic()
        found = run_row(row, options.seconds, min(options.limit, left)) if left > 10 else None
        if found is None or ("took longer" in found.get("error", "") and left < options.limit):
            print("the time is up; the same command goes on from here", flush=True)
            break
        results.add(key, found)
        what = found.get("error") or f"{found['images_per_second']:.0f} images/s"
        print(f"{key}: {what}", flush=True)
    print(table(results.saved["rows"]))


if __name__ == "__main__":
    main()
