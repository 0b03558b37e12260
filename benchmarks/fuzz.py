"""Feed broken weights and images to the readers for minutes; count how it ends.

    python benchmarks/fuzz.py [--minutes=4] [--targets=weights,images] [--json=FILE]

Each target runs in a process of its own, whose address space is limited: what allocates more than
that fails, what crashes is counted with its signal and its seed, what takes longer than a minute
is killed and counted as a hang. The inputs are those of tests/hostile.py; with atheris installed
it guides them by coverage, otherwise a seed is a number that counts up.
"""

import argparse
import collections
import concurrent.futures
import datetime
import functools
import importlib.util
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
HANG_S = 60
ROOM = 2 << 30  # bytes of address space beyond what the libraries take when they are loaded


def main() -> None:
    """Run the targets side by side and write what they met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="for each target")
    parser.add_argument("--targets", default="weights,images")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    today = datetime.date.today()
    default = ROOT / "benchmarks" / "results" / f"fuzz-{today}.json"
    parser.add_argument("--json", type=Path, default=default)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.minutes * 60, options.seed)
        return
    packages = ("pillow", "simplejpeg", "numpy", "safetensors", "jax", "orbax-checkpoint")
    result = {
        "command": "python benchmarks/fuzz.py " + " ".join(sys.argv[1:]),
        "date": str(today),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "guided_by_coverage": importlib.util.find_spec("atheris") is not None,
        "room_mib": ROOM >> 20,
        "hang_s": HANG_S,
    }
    targets = options.targets.split(",")
    with concurrent.futures.ThreadPoolExecutor(len(targets)) as pool:
        feed = functools.partial(run, seconds=options.minutes * 60, seed=options.seed)
        result |= dict(zip(targets, pool.map(feed, targets), strict=True))
    for target in targets:
        print(target, json.dumps({k: v for k, v in result[target].items() if k != "outcomes"}))
    options.json.write_text(json.dumps(result, indent=1) + "\n")


def run(target: str, seconds: float, seed: int) -> dict:
    """Run a target for so long, in as many processes as it takes; return their sums."""
    total = {"executions": 0, "opened": 0, "refused": 0, "slowest_s": 0.0, "peak_rss_mib": 0.0}
    total |= {"unexpected": [], "crashes": [], "hangs": []}
    outcomes, end = collections.Counter(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while (left := end - time.monotonic()) > 0:
            log = Path(folder) / "log"
            log.write_text("")
            code = watched(target, left, seed, log)
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            seed = max([seed, *(line["seed"] + 1 for line in lines if "seed" in line)])
            if code:  # the seed is one of the next second
                total["hangs" if code == "hang" else "crashes"].append({"seed": seed, "code": code})
                seed += 1000
            for line in lines:
                add(total, outcomes, line)
    total["different_outcomes"] = len(outcomes)
    total["outcomes"] = dict(outcomes.most_common(40))
    return total


def add(total: dict, outcomes: collections.Counter, line: dict) -> None:
    """Count what a child wrote of some seeds."""
    for key in ("executions", "opened", "refused"):
        total[key] += line.get(key, 0)
    total["unexpected"] += line.get("unexpected", [])
    total["peak_rss_mib"] = max(total["peak_rss_mib"], line.get("peak_rss_mib", 0.0))
    if line.get("slowest_s", 0.0) > total["slowest_s"]:
        total["slowest_s"], total["slowest_seed"] = line["slowest_s"], line["slowest_seed"]
    outcomes.update(line.get("outcomes", {}))


def watched(target: str, seconds: float, seed: int, log: Path) -> int | str:
    """Run a child until it ends or stands still; return its exit code, or "hang"."""
    words = [f"--child={target}", f"--minutes={seconds / 60}", f"--seed={seed}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with log.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdout=out,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=ROOT,
        )
        size, since = -1, time.monotonic()
        while process.poll() is None:
            time.sleep(0.5)
            if log.stat().st_size != size:
                size, since = log.stat().st_size, time.monotonic()
            elif time.monotonic() - since > 2 * HANG_S:  # loading the libraries is slow, too
                process.kill()
                process.wait()
                return "hang"
    return process.returncode


def child(target: str, seconds: float, seed: int) -> None:
    """Feed seeds to a target, writing a line of JSON each second and before what is slow."""
    from tests import hostile

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        feed = hostile.Weights(Path(folder)) if target == "weights" else hostile.Images()
        for number in range(20):
            feed(seed + number)  # what is loaded on first use does not count
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        if importlib.util.find_spec("atheris"):
            guided(feed, seconds, seed)
        else:
            Counter(feed, seconds).count_up(seed)
    sys.stdout.flush()
    os._exit(0)


def guided(feed, seconds: float, seed: int) -> None:
    """Let atheris choose the seeds, by the branches that they reach."""
    import atheris

    counter = Counter(feed, seconds)
    atheris.instrument_all()

    def once(data: bytes) -> None:
        counter.once(random.Random(data).getrandbits(63))
        if counter.over():
            counter.flush()
            os._exit(0)

    atheris.Setup([sys.argv[0], f"-seed={seed + 1}"], once)
    atheris.Fuzz()


class Counter:
    """Feed seeds and keep account of how they end."""

    def __init__(self, feed, seconds: float):
        self.feed, self.end = feed, time.monotonic() + seconds
        self._new()

    def _new(self) -> None:
        self.line = {"executions": 0, "opened": 0, "refused": 0, "unexpected": []}
        self.line |= {"slowest_s": 0.0, "slowest_seed": None}
        self.outcomes, self.since = collections.Counter(), time.monotonic()

    def over(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() > self.end

    def count_up(self, seed: int) -> None:
        """Feed one seed after the other."""
        while not self.over():
            self.once(seed)
            seed += 1
        self.flush()

    def once(self, seed: int) -> None:
        """Feed one seed."""
        self.line["seed"] = seed
        began = time.monotonic()
        try:
            text = self.feed(seed)
            self.line["opened" if text.startswith(("opened", "decoded")) else "refused"] += 1
            self.outcomes[re.sub(r"0x[0-9a-f]+|\d+", "0", text)[:100]] += 1
        except Exception as error:
            self.line["unexpected"].append(
                {"seed": seed, "error": f"{type(error).__name__}: {error}"[:300]}
            )
        taken = time.monotonic() - began
        self.line["executions"] += 1
        if taken > self.line["slowest_s"]:
            self.line["slowest_s"], self.line["slowest_seed"] = round(taken, 3), seed
        if time.monotonic() - self.since > 1:
            self.flush()

    def flush(self) -> None:
        """Write what has been counted since the last time."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        line = {**self.line, "outcomes": self.outcomes, "peak_rss_mib": round(peak, 1)}
        print(json.dumps(line), flush=True)
        self._new()


if __name__ == "__main__":
    main()
