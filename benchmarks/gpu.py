"""The training step and the forward pass on one GPU, beside timm's in PyTorch and a plain Flax ViT.

    python -m benchmarks.gpu [--part=train,forward,plain] [--minutes=8.5] [--out=FILE.json]
    python -m benchmarks.gpu --toy --out=FILE.json         the same code at toy size on a CPU
    python -m benchmarks.gpu --table --out=FILE.json       print what a file holds, measure nothing

Parts: `train` is DeiT distilled from a RegNetY-16GF (teacher forward, argmax, student forward, hard
distillation, backward, AdamW); `forward` the distilled student's prediction at 224 and 384 pixels
(the throughput column of the paper's table 5); `plain` a ViT with one class token and no teacher.
All compute in bfloat16 over float32 weights in training, bfloat16 weights in prediction and in the
teacher, whose batch norm is folded, on uint8 images of random noise that are on the GPU already.

Peers: `ours` is the step of `deit train` but for the moving average: it also erases, mixes and
checks its loss, which no peer does; `replay` the same with the teacher's labels from a tape.
`compile`, `graphs` and `eager` are timm's TokenDistillationTask under autocast with torch.compile,
the same with mode="reduce-overhead" (CUDA graphs), and without: channels-last teacher, timm's
scaled-dot-product attention, fused AdamW. `flax` is a ViT of flax.linen's own layers, as in
big_vision. Our residual stream is bfloat16; timm's, under autocast, is float32.

Every row (part, model, batch, peer, turn) is a process of its own with a time limit, one after the
other, what matters most first, and is written down when it ends: start it again and it goes on with
what is missing; rows that failed are kept with their reason (--retry). Shares of the peak are by
the same operations for all peers, memory is the most that the framework's allocator had handed out.
Needs jax, flax, optax, orbax, ml_collections, einops and jaxtyping, of PyTorch's side torch,
torchvision, timm >= 1.0.25 and pytest.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from deit_jax.perf.chips import CHIPS, device_of
from deit_jax.storage import write_json

ROOT = Path(__file__).resolve().parent.parent
PEERS = {
    "train": ("ours", "replay", "compile", "graphs", "eager"),
    "forward": ("ours", "compile", "graphs", "eager"),
    "plain": ("ours", "flax"),
}
JAXS = ("ours", "replay", "flax")
BATCH = 256
# What matters most first: one model whole, then the next.
ORDER = (
    ("train", "small", 224, ("ours", "compile", "graphs", "replay")),
    ("train", "base", 224, ("ours", "compile", "graphs")),
    ("plain", "base", 224, ("ours", "flax")),
    ("forward", "base", 224, ("ours", "compile", "graphs")),
    ("train", "small", 224, ("eager",)),
    ("train", "base", 224, ("eager", "replay")),
    ("train", "tiny", 224, PEERS["train"]),
    ("forward", "base", 384, ("ours", "compile", "graphs")),
    ("forward", "small", 224, ("ours", "compile", "graphs")),
    ("forward", "tiny", 224, ("ours", "compile", "graphs")),
    ("plain", "small", 224, PEERS["plain"]),
    ("plain", "tiny", 224, PEERS["plain"]),
    *(("forward", name, 224, ("eager",)) for name in ("base", "small", "tiny")),
    ("forward", "base", 384, ("eager",)),
)
TOY_ORDER = tuple((part, "tiny", 32, peers) for part, peers in PEERS.items())
WINDOWS, WARM_UP = 5, 3
PATIENCE = 5  # seconds
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory")


def rows(parts: list[str], batches: list[int], turns: int, toy: bool) -> dict[str, dict]:
    """Return every row by its key, in the order in which they are measured."""
    found, sizes = {}, (8,) if toy else batches or (BATCH,)
    for turn, batch in itertools.product(range(1, turns + 1), sizes):
        for part, model, size, peers in TOY_ORDER if toy else ORDER:
            for peer in peers if part in parts else ():
                key = f"{part}/{model}/{size}/{batch}/{peer}/{turn}"
                row = {"part": part, "model": model, "image_size": size, "batch": batch}
                found[key] = row | {"peer": peer, "turn": turn, "toy": toy}
    return found


def measure(row: dict, seconds: float) -> dict:
    """Measure one row in this process: ms of a step in each of five windows, and the rest."""
    if row["peer"] in JAXS:
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
    return {
        **row,
        "first_step_s": first,
        "steps_per_window": steps,
        "windows_ms": [1e3 * t for t in times],
        "images_per_second": row["batch"] / median(times),
        **facts(),
    }


def measured_or_why_not(row: dict, seconds: float) -> dict:
    """Return what `measure` does, or {"error": the cause}."""
    try:
        return measure(row, seconds)
    except Exception as error:
        return {**row, "error": cause(error)}


def cause(error: BaseException) -> str:
    """Return in one line what went wrong first.

    The last line of a traceback would be JAX's advice on tracebacks, and what torch.compile raises
    wraps what its back end did.
    """
    text = str(error)
    if any(word in f"{type(error).__name__} {text}" for word in OUT_OF_MEMORY):
        return "out of memory"
    inner = error.__cause__ or getattr(error, "inner_exception", None)
    if inner is not None and type(inner).__name__ != "UnfilteredStackTrace":
        return cause(inner)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def run_row(row: dict, seconds: float, limit: float) -> dict:
    """Measure a row in a process of its own; return its figures, or {"error"}."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            f"--row={json.dumps(row)}",
            f"--seconds={seconds}",
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {**row, "error": f"took longer than {limit:.0f} s"}
    finally:  # also on Ctrl-C: or it would hold the GPU's memory, as would torch.compile's workers
        stop(process)
    if process.returncode == 0:
        return json.loads(out.splitlines()[-1])
    return {**row, "error": crash(process.returncode, err)}


def environment() -> dict[str, str]:
    """Return the variables of a row's process, which has the GPU's memory for itself."""
    known = {**os.environ}
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(known):
        known["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
    return known


def stop(process: subprocess.Popen) -> None:
    """End a process, if it runs, and what it started; it leads a group of its own.

    It has some seconds to do so itself, as what it started may lead others.
    """
    if process.poll() is not None:
        return
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def crash(code: int, err: str) -> str:
    """Return in one line why a process ended that could not say so itself."""
    if any(word in err for word in OUT_OF_MEMORY):
        return "out of memory"
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    errors = [x for x in lines if re.match(r"([\w.]+(Error|Exception)\b|F\d{4} |Fatal )", x)]
    return f"{how}: {(errors or lines or ['it said nothing'])[-1]}"[:300]


def flops_of(rows: dict[str, dict]) -> dict[str, float]:
    """Return the operations of an image for each row, counted by a process without the GPU."""
    code = (
        "import json, sys; from benchmarks import gpu_jax; rows = json.load(sys.stdin);"
        "print(json.dumps({k: gpu_jax.flops_of(r) for k, r in rows.items()}))"
    )
    # Those of a distilled step are the same whoever takes it; a tape's are without the teacher.
    kinds = {kind_of(row): row for row in rows.values()}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        input=json.dumps(kinds),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"operations cannot be counted: {crash(done.returncode, done.stderr)}")
    counted = json.loads(done.stdout.splitlines()[-1])
    return {key: counted[kind_of(row)] for key, row in rows.items()}


def kind_of(row: dict) -> str:
    """Return what a row's operations depend on."""
    return f"{row['part']}/{row['model']}/{row['image_size']}/{row['peer'] == 'replay'}"


def with_share(row: dict, flops: float, device: str | None) -> dict:
    """Return a row with its operations and the share of the device's peak that they come to."""
    chip = CHIPS.get(device_of(device or "") or "")
    if "images_per_second" not in row:
        return row
    share = chip and row["images_per_second"] * flops / (chip.peak_tflops * 1e12)
    return row | {"flops_per_image": flops, "peak_tflops": chip and chip.peak_tflops, "mfu": share}


HEAD = ("model", "px", "batch", "peer", "images/s", "ours / it", "share of the peak", "GB")


def table(done: dict[str, dict]) -> str:
    """Return the rows as Markdown, one table a part; a ratio is the median of those of turns."""
    lines = []
    for part, peers in PEERS.items():
        mine = [row for row in done.values() if row["part"] == part]
        if mine:
            lines += [f"{part}:", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
        for case in dict.fromkeys((r["model"], r["image_size"], r["batch"]) for r in mine):
            same = [r for r in mine if (r["model"], r["image_size"], r["batch"]) == case]
            for peer in peers:
                if any(r["peer"] == peer for r in same):
                    cells = [*case, peer, *_figures(same, peer)]
                    lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines += [""] if mine else []
    return "\n".join(lines)


def _figures(same: list[dict], peer: str) -> list[str]:
    errors = [r["error"] for r in same if r["peer"] == peer and "error" in r]
    rate = errors[0] if errors else _middle(same, peer, "images_per_second", 1, ".0f")
    share = _middle(same, peer, "mfu", 0.01, ".1f", " %")
    return [rate, _ratio(same, peer), share, _middle(same, peer, "peak_bytes", 1e9, ".1f")]


def _middle(same: list[dict], peer: str, key: str, unit: float, form: str, sign: str = "") -> str:
    values = [r[key] / unit for r in same if r["peer"] == peer and r.get(key)]
    return format(median(values), form) + sign if values else "-"


def _ratio(same: list[dict], peer: str) -> str:
    rates = {(r["peer"], r["turn"]): r.get("images_per_second") for r in same}
    turns = sorted({r["turn"] for r in same})
    pairs = [(rates.get(("ours", t)), rates.get((peer, t))) for t in turns]
    ratios = [a / b for a, b in pairs if a and b]
    return f"{median(ratios):.2f}" if ratios and peer != "ours" else "-"


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
        # JAX and PyTorch may name a card otherwise, as with and without its memory.
        elif device is not None and device_of(device) != device_of(known):
            raise SystemExit(f"{self.path} is of a {known}, this is a {device}; give another --out")
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        self.saved |= {"date": today, "python": platform.python_version()}
        self.saved["versions"] = self.saved.get("versions", {}) | versions
        self.saved["rows"][key] = row
        write_json(self.path, self.saved)

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
    if options.row:  # it leaves signals as they are: Python would see them only after compiling
        print(json.dumps(measured_or_why_not(json.loads(options.row), options.seconds)))
        return
    for how in (signal.SIGINT, signal.SIGTERM):  # so that `finally` stops what it started
        signal.signal(how, lambda *_: sys.exit("stopped; the same command goes on from here"))
    results, end = Results(options.out), time.monotonic() + 60 * options.minutes
    batches = [int(n) for n in options.batches.split(",") if n]
    planned = rows(options.parts, batches, options.turns, options.toy)
    peers = options.peers.split(",") if options.peers else None
    wanted = {k: row for k, row in planned.items() if not peers or row["peer"] in peers}
    missing = {k: row for k, row in wanted.items() if not results.has(k, options.retry)}
    missing = {} if options.table else missing
    flops = flops_of(missing) if missing else {}
    for key, row in missing.items():
        left = end - time.monotonic()
        found = run_row(row, options.seconds, min(options.limit, left)) if left > 10 else None
        if found is None or ("took longer" in found.get("error", "") and left < options.limit):
            print("the time is up; the same command goes on from here", flush=True)
            break
        device = found.get("device") or results.saved.get("device")
        results.add(key, found := with_share(found, flops[key], device))
        what = found.get("error") or f"{found['images_per_second']:.0f} images/s"
        print(f"{key}: {what}", flush=True)
    print(table(results.saved["rows"]))


if __name__ == "__main__":
    main()
