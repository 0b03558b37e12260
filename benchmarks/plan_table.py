"""What `deit plan` says of the paper's configs on four kinds of TPU: a table for docs/.

    python -m benchmarks.plan_table [--out=benchmarks/results/plan-DATE.json] [--table=FILE.md]

One row after the other, each in a process of its own and written down as soon as it is there: start
it again and it goes on with what is missing. A minute or two a row on one free core.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Cloud names count TensorCores for v4 and v5p, two a chip, and chips for v5e and v6e.
TOPOLOGIES = {"v4-64": "v4:4x4x2", "v5e-64": "v5e:8x8", "v5p-32": "v5p:2x2x4", "v6e-64": "v6e:8x8"}
CONFIGS = {
    "DeiT-B distilled": ["configs/deit.py:variant=base,distilled=True"],
    "DeiT-S distilled": ["configs/deit.py:variant=small,distilled=True"],
    "DeiT-Ti distilled": ["configs/deit.py:variant=tiny,distilled=True"],
    "DeiT-B distilled, fine-tuning at 384": ["configs/deit_finetune384.py:variant=base"],
}


def rows(done: dict) -> list[tuple[str, str, str]]:
    """Return (key, config, topology) of what is missing."""
    every = [(f"{config} on {name}", config, name) for config in CONFIGS for name in TOPOLOGIES]
    return [row for row in every if row[0] not in done]


def plan(config: str, topology: str) -> dict:
    """Run `deit plan` and return its figures; raise RuntimeError with its last line."""
    file, *flags = CONFIGS[config]
    command = [sys.executable, "-m", "deit_jax", "plan", f"--config={file}", *flags]
    command += [f"--topology={TOPOLOGIES[topology]}", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[3:])}: {done.stderr.strip().splitlines()[-1]}")
    result = json.loads(done.stdout)
    result.pop("config")
    return {"config": config, "slice": topology, "command": " ".join(command[3:-1]), **result}


def versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jaxlib", "libtpu")}


def table(plans: list[dict]) -> str:
    """Return the plans as a Markdown table."""
    lines = [
        "| config | slice | chips | images a chip | peak / HBM (GiB) | all-reduce + all-gather + "
        "other (MB) | step (ms) | images/s a chip | MFU | hours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        sizes, moved = p["per_chip"], p["collectives"]
        peak = f"{(sizes['peak_bytes'] or 0) / 2**30:.1f} / {sizes['hbm_bytes'] / 2**30:.1f}"
        cells = [p["config"], p["slice"], p["chips"], f"{p['images_per_chip']:g}"]
        if not p["fits"]:
            cells += [f"{peak}: does not fit", *["-"] * 5]
        else:
            first, second = moved["all_reduce"], moved["all_gather"]
            rest = sum(moved.values()) - first - second
            cells += [
                peak,
                f"{first / 1e6:.0f} + {second / 1e6:.0f} + {rest / 1e6:.0f}",
                f"{p['estimated_step_ms']:.1f}",
                f"{p['images_per_second_per_chip']:.0f}",
                f"{p['mfu']:.0%}",
                f"{p['hours']:.1f}",
            ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fill the file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    day = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/plan-{day}.json")
    parser.add_argument("--table", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    saved = json.loads(options.out.read_text()) if options.out.exists() else {}
    plans = saved.get("plans", {})
    for key, config, topology in rows(plans):
        print(key, flush=True)
        try:
            plans[key] = plan(config, topology)
        except RuntimeError as error:  # the other rows can still be planned
            print(error, flush=True)
            continue
        text = json.dumps({"versions": versions(), "plans": plans}, indent=1)
        options.out.write_text(text + "\n")
    text = table(
        [plans[k] for k in (f"{c} on {t}" for c in CONFIGS for t in TOPOLOGIES) if k in plans]
    )
    print(text)
    if options.table:
        options.table.write_text(text)


if __name__ == "__main__":
    main()
