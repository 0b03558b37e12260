"""One NVIDIA GPU, ten minutes: is everything right on it, and how fast; see gpu_check.sh.

    python -m benchmarks.gpu_check --out=DIR [--seconds=575] [--retry] [--toy] [--only=smoke,rows]
    python -m benchmarks.gpu_check --out=DIR --table       print what DIR holds, measure nothing

Stages, each a process with a time limit: `environment`; then at once, so that their times say
nothing, `smoke` (gpu_smoke.py), `tests` (those that need no eight devices), `quickstart` (a
training) and `bench`; then alone `micro` (gpu_micro.py), `attention` (the step with each kernel of
attention) and `rows` (gpu.py, what matters most first, as far as the time goes). DIR gets
gpu_check.json and each stage's own file and log. What is done is not done again, except with
--retry what failed. With STATE=DIR what is done is kept there too, and taken up from there into an
empty --out.

Packages that are missing are installed for the run from .gpu/wheels (gpu_prepare.sh). Without a GPU
that JAX sees it ends; --toy tries the code on a CPU. Exit code 1 if a stage found something wrong.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks import gpu, gpu_machine
from deit_jax.cli import platforms
from deit_jax.storage import write_json

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-m"]
TOGETHER, ALONE = ("smoke", "tests", "quickstart", "bench"), ("micro", "attention", "rows")
LIMITS = {
    "smoke": 120,
    "tests": 150,
    "quickstart": 120,
    "bench": 120,
    "micro": 90,
    "attention": 100,
}
PATIENCE = 5  # times as long for --toy: limits are a GPU's, and a CPU may be old and busy
STOPPED = "stopped after"
LEARNT = 95.0  # per cent; what the quickstart's student reaches at least on a CPU, with room
SHORTEST = 20  # seconds that a stage is started for
TESTS = ("kernels", "attention", "noise", "losses", "flops", "optim", "mixing", "vit", "step")
TESTS += ("convnets",)  # the longest last
# With pytest-xdist "[gw0] [ 50%] PASSED tests/…", without "tests/…::… PASSED [ 50%]".
TESTED = re.compile(r"\[gw\d+\] +\[ *\d+%\] (\w+) tests/|tests/\S+::.* ([A-Z]+) +\[ *\d+%\]$")


def commands(out: Path, work: Path, toy: bool) -> dict[str, list[str]]:
    """Return the command of each stage."""
    small = ["--toy"] if toy else []
    tests = [f"tests/test_{name}.py" for name in (("losses",) if toy else TESTS)]
    workers = ["-n", "5"] if importlib.util.find_spec("xdist") and not toy else []
    # -o addopts= since jaxtyping's checks need a package more.
    words = ["-o", "addopts=", "-W", "ignore", "-p", "no:cacheprovider", "-v", "--tb=short"]
    deit, quick = [*PYTHON, "deit_jax"], "--config=configs/quickstart.py"
    short = ["--config.epochs=1", "--config.teacher.epochs=1"] if toy else []
    # 198 tokens: JAX trains with cuDNN's attention only where their number is even. A few blocks
    # compile sooner than twelve.
    student = ["--config=configs/deit.py:variant=base,distilled=True,kind=none"]
    student += ["--config.model.depth=4", "--config.batch_size=256", "--seconds=4"]
    toys = ["--config.model.depth=1", "--config.model.image_size=32", "--config.batch_size=8"]
    toys += ["--config.mixing.group_size=8", "--seconds=0.2"]
    return {
        "smoke": [*PYTHON, "benchmarks.gpu_smoke", f"--out={out / 'smoke.json'}", *small],
        "tests": [*PYTHON, "pytest", *words, *workers, "-m", "not eight_devices", *tests],
        "quickstart": [*deit, "train", quick, f"--workdir={work / 'quickstart'}", "--json", *short],
        "bench": [*deit, "bench", quick, "--seconds=1", "--json"],
        "micro": [*PYTHON, "benchmarks.gpu_micro", f"--out={out / 'micro.json'}", *small],
        "attention": [*deit, "bench", "--compare", "--json", *student, *(toys if toy else [])],
        "rows": [*PYTHON, "benchmarks.gpu", f"--out={out / 'gpu.json'}", *small],
    }


class Job:
    """A stage's process, with a log and a limit."""

    def __init__(self, name: str, command: list[str], limit: float, work: Path, variables: dict):
        self.name, self.limit, self.path = name, limit, work / f"{name}.log"
        self.began = time.monotonic()
        with self.path.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def found(self) -> dict | None:
        """Return {"exit", "seconds", "tail", ...} once it has ended, or is ended at its limit."""
        seconds, code = time.monotonic() - self.began, self.process.poll()
        if code is None and seconds < self.limit:
            return None
        if code is None:
            gpu.stop(self.process)
            code = f"{STOPPED} {self.limit:.0f} s"
        lines = self.path.read_text(errors="replace").splitlines()
        found = {"exit": code, "seconds": round(seconds, 1), **told(self.name, lines)}
        return {**found, "tail": lines[-25:]}

    def wait(self) -> dict:
        """Return what `found` does, when it has ended."""
        try:
            while (found := self.found()) is None:
                time.sleep(0.1)
            return found
        finally:
            gpu.stop(self.process)


def told(name: str, lines: list[str]) -> dict:
    """Return what the lines of a stage's log say: its JSON object, or its tests."""
    if name == "tests":
        # Line by line, so that a stage that was stopped tells what it had found.
        count = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
        for match in filter(None, map(TESTED.match, lines)):
            mark = match[1] or match[2]
            count[mark] = count.get(mark, 0) + 1
        failed = {x for x in lines if re.match(r"(FAILED|ERROR) tests/", x)}
        return {"count": count, "failed": sorted(failed)}
    objects = [line for line in lines if line.startswith("{")]
    with contextlib.suppress(ValueError):
        return {"result": json.loads(objects[-1])} if objects else {}
    return {}


class Check:
    """All stages, and gpu_check.json, where they are written down."""

    def __init__(
        self, out: Path, state: Path | None, seconds: float, toy: bool = False, retry: bool = False
    ):
        self.out, self.state, self.toy, self.retry = out, state, toy, retry
        self.work = state or out
        self.limits = {name: seconds * (PATIENCE if toy else 1) for name, seconds in LIMITS.items()}
        self.end = time.monotonic() + seconds
        for folder in filter(None, (out, state)):
            folder.mkdir(parents=True, exist_ok=True)
        for path in state.glob("*.json") if state else ():
            if not (out / path.name).exists():
                shutil.copy(path, out)
        self.path = out / "gpu_check.json"
        self.saved = json.loads(self.path.read_text()) if self.path.exists() else {}

    def keep(self, name: str, found: dict) -> None:
        """Write down what a stage found."""
        self.saved |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), name: found}
        write_json(self.path, self.saved)

    def left(self) -> float:
        """Return the seconds that are left, some kept for the end."""
        return self.end - time.monotonic() - 5

    def start(self, name: str, variables: dict) -> Job | None:
        """Start a stage; None if there is no time for it."""
        limit = min(self.limits.get(name, 1e6), self.left())
        if limit < SHORTEST:
            say(f"{name}: no time is left; the same command goes on from here")
            return None
        command = commands(self.out, self.work, self.toy)[name]
        if name == "rows":
            command = [*command, f"--minutes={(limit - 10) / 60}"]
            command += ["--part=plain", "--peers=flax", "--seconds=0"] if self.toy else []
            command += ["--retry"] if self.retry else []
        return Job(name, command, limit, self.work, variables)

    def run(self, names: list[str], variables: dict) -> None:
        """Run stages at once, and write down what each found."""
        jobs, copied = list(filter(None, [self.start(name, variables) for name in names])), 0.0
        try:
            while jobs:
                time.sleep(0.1)
                for job in list(jobs):
                    if found := job.found():
                        jobs.remove(job)
                        self.ended(job, found)
                if time.monotonic() - copied > 5:  # rows are written down one by one
                    self.copy()
                    copied = time.monotonic()
        finally:  # also on Ctrl-C: what is left would hold the GPU's memory
            for job in jobs:
                gpu.stop(job.process)
            self.copy()

    def ended(self, job: Job, found: dict) -> None:
        """Write down what a stage found, but for one that had less time than it may have."""
        say(f"{job.name}: exit {found['exit']}, {found['seconds']} s")
        short = str(found["exit"]).startswith(STOPPED) and job.limit < self.limits.get(job.name, 0)
        if short:
            say(f"{job.name}: it had too little time; the same command goes on from here")
        else:
            self.keep(job.name, found)

    def copy(self) -> None:
        """Copy what was found to where it is kept."""
        for path in self.out.glob("*.json") if self.state else ():
            shutil.copy(path, self.state)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the stages that are to be run; `rows` knows itself what is missing of it."""

        def is_done(name: str) -> bool:
            found = self.saved.get(name)
            return found is not None and not (self.retry and found["exit"] != 0)

        return [name for name in names if name == "rows" or not is_done(name)]

    def json(self, name: str) -> dict:
        """Return a stage's own file, {} if there is none."""
        path = self.out / name
        return json.loads(path.read_text()) if path.exists() else {}


def wrong(check: Check) -> list[str]:
    """Return a line for each thing that is not as it should be."""
    stages = [n for n in (*TOGETHER, *ALONE) if n in check.saved]
    lines = []
    for name in stages:
        found = check.saved[name]
        if found["exit"] != 0 and name != "tests":
            lines.append(f"{name}: exit {found['exit']}: {(found['tail'] or [''])[-1]}")
    learnt = check.saved.get("quickstart", {}).get("result", {}).get("fused", {}).get("top1")
    if learnt is not None and learnt < LEARNT and not check.toy:
        lines.append(f"quickstart: {learnt:.1f} % of the digits, not {LEARNT} % (docs/results.md)")
    times = check.saved.get("attention", {}).get("result", {}).get("attention_ms", {})
    missed = {} if check.toy else {k: v for k, v in times.items() if isinstance(v, str)}
    lines += [f"attention by {kernel}: {reason}" for kernel, reason in missed.items()]
    tests = check.saved.get("tests", {})
    lines += tests.get("failed", [])
    if tests and tests["exit"] != 0 and not tests["failed"]:
        lines.append(f"tests: exit {tests['exit']}; so far {tests['count']}")
    for name, file in (("smoke", "smoke.json"), ("micro", "micro.json")):
        for key, found in check.json(file).items():
            if not found["ok"]:
                lines.append(f"{name}, {key}: {found.get('error') or found}")
    rows = check.json("gpu.json").get("rows", {})
    return lines + [f"rows, {key}: {row['error']}" for key, row in rows.items() if "error" in row]


def summary(check: Check) -> str:
    """Return what all stages found, to read."""
    saved, lines = check.saved, []
    if env := saved.get("environment"):
        lines += [f"device: {env['nvidia_smi'] or env['device']}", f"versions: {env['versions']}"]
    if smoke := check.json("smoke.json"):
        lines.append(
            f"smoke: {sum(x['ok'] for x in smoke.values())} of {len(smoke)} as they should"
        )
        bits = {k: v["same_bits"] for k, v in smoke.items() if "same_bits" in v}
        lines += [f"  the same each time: {key}: {same}" for key, same in bits.items()]
        kernels = {k: v["kernel"] for k, v in smoke.items() if "auto" in k and "kernel" in v}
        lines += [f"  {key}: {kernel}" for key, kernel in kernels.items()]
    if tests := saved.get("tests"):
        lines.append(f"tests: {tests['count']} in {tests['seconds']} s")
    for name in ("quickstart", "attention"):
        if name in saved:
            lines.append(f"{name}: {json.dumps(saved[name].get('result'))}")
    if "bench" in saved:  # beside three other stages: its times say nothing
        lines.append(f"bench: exit {saved['bench']['exit']}")
    times = {k: v["ms"] for k, v in check.json("micro.json").items() if "ms" in v}
    lines += [f"micro, {key}: {ms:.3f} ms" for key, ms in times.items()]
    if rows := check.json("gpu.json").get("rows"):
        lines += ["", gpu.table(rows)]
    bad = wrong(check)
    return "\n".join(
        [*lines, "", f"{len(bad)} things are wrong" if bad else "nothing is wrong", *bad]
    )


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", flush=True)


def prepared(check: Check) -> None:
    """Make ready what the stages need, look at the machine; raise SystemExit without a GPU."""
    site = check.work / "packages"
    for name in gpu_machine.install_what_is_missing(site):
        say(f"installed for this run: {name}")
    warning = platforms.choose()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(site.resolve())])
    if (named := os.environ.get("JAX_PLATFORMS")) and "cpu" not in named:
        os.environ["JAX_PLATFORMS"] = f"{named},cpu"  # which checks compare with
    os.environ["JAX_TRACEBACK_FILTERING"] = "off"  # or an error's last lines are a remark on it
    if root := gpu_machine.cuda_root((check.work / "cuda").resolve()):
        os.environ["CUDA_ROOT"] = root
    command = [*PYTHON, "benchmarks.gpu_check", "--environment", f"--out={check.out}"]
    found = Job("environment", command, min(90, check.left()), check.work, {}).wait()
    if found["exit"] != 0:
        sys.exit(f"JAX does not start here: {(found['tail'] or [found['exit']])[-1]}")
    if found["result"]["backend"] != "gpu" and not check.toy:
        sys.exit(warning or 'JAX sees no GPU here: pip install "jax[cuda13]", or try --toy')
    check.keep("environment", found["result"])
    say(f"{found['result']['device']}, {found['result']['versions']}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=575.0, help="end after so many")
    parser.add_argument("--only", default="", help=f"some of {', '.join((*TOGETHER, *ALONE))}")
    parser.add_argument("--retry", action="store_true", help="do what failed again")
    parser.add_argument("--toy", action="store_true", help="small, to try the code on a CPU")
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = tuple(filter(None, options.only.split(","))) or (*TOGETHER, *ALONE)
    if unknown := set(options.only) - {*TOGETHER, *ALONE}:
        parser.error(f"--only: {', '.join(sorted(unknown))}: it is no stage")
    return options


def main() -> None:
    """Do what is not done yet, as far as the time goes, and print what was found."""
    options = parse()
    for how in (signal.SIGINT, signal.SIGTERM):  # so that `finally` stops what it started
        signal.signal(how, lambda *_: sys.exit("stopped; the same command goes on from here"))
    if options.environment:
        print(json.dumps(gpu_machine.environment()))
        return
    state = Path(os.environ["STATE"]).resolve() if os.environ.get("STATE") else None
    check = Check(options.out.resolve(), state, options.seconds, options.toy, options.retry)
    if not options.table:
        prepared(check)
        few = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several processes share the memory
        together, alone = ([n for n in names if n in options.only] for names in (TOGETHER, ALONE))
        check.run(check.missing(together), few | {"TEST_GPU": "1"})
        # Programs and what was tuned for them are kept from here on: many share their parts.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(check.work / "xla")}
        for name in check.missing(alone):
            check.run([name], cache)
    print(summary(check))
    sys.exit(bool(wrong(check)))


if __name__ == "__main__":
    main()
