"""What ten usual teachers cost beside a DeiT-S: a table for docs/teachers.md.

    python -m benchmarks.teachers [--out=benchmarks/results/teachers-DATE.json] [--folders=DIR]

Each is a model of timm with random weights, which cost what trained ones do, written as a teacher
folder (this needs the extra `torch`). `deit plan` then compiles the whole distilled step with it,
and without any teacher, for a v5e:4x4 at 128 images a chip. Each row is written down as soon as it
is there: start it again and it goes on. Two to five minutes a row on one free core.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from deit_jax.cli import convert

ROOT = Path(__file__).resolve().parent.parent
PLAN = ["--config=configs/deit.py:variant=small,distilled=True", "--config.batch_size=2048"]
TOPOLOGY = "v5e:4x4"
TEACHERS = {  # and the flags of their conversion
    "regnety_160": [],
    "regnety_040": [],
    "resnet50": [],
    "resnet101": [],
    "convnext_tiny": [],
    "convnext_base": [],
    "efficientnet_b0": [],
    "tf_efficientnetv2_s": ["--image_size=224"],
    "swin_tiny_patch4_window7_224": [],
    "vit_small_patch14_dinov2": ["--image_size=224"],
}
NONE, NATIVE = "no teacher", "regnety_160, our own"
ROWS = {
    NONE: ["--config.teacher.tape=replay", "--config.teacher.tape_path=any"],
    NATIVE: ["--config.teacher.model.name=regnety_160"],
}


def folder_of(name: str, folders: Path) -> Path:
    """Return the teacher folder of a model with random weights, written unless it is there."""
    import timm
    import torch

    folder = folders / name
    if not folder.exists():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as temporary:
            weights = Path(temporary) / "weights.pth"
            torch.save(timm.create_model(name).state_dict(), weights)
            convert.main([f"timm:{name}@{weights}", str(folder), *TEACHERS[name]])
    return folder


def plan(flags: list[str]) -> dict:
    """Run `deit plan` and return its figures; raise RuntimeError with its last line."""
    command = [sys.executable, "-m", "deit_jax", "plan", *PLAN, f"--topology={TOPOLOGY}", *flags]
    done = subprocess.run(
        [*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[3:])}: {done.stderr.strip().splitlines()[-1]}")
    result = json.loads(done.stdout)
    kept = ("estimated_cycles", "estimated_step_ms", "flops_per_step", "hours", "per_chip", "fits")
    return {"flags": flags, **{key: result[key] for key in kept}}


def measured(name: str, folders: Path) -> dict:
    """Return the figures of one row."""
    if name in ROWS:
        return plan(ROWS[name])
    folder = folder_of(name, folders)
    kind = ["--config.distill.kind=feature"] if "dino" in name else []
    said = json.loads((folder / "teacher.json").read_text())
    facts = {key: said[key] for key in ("macs", "image_size", "features")}
    result = plan([*kind, f"--config.teacher.weights={folder}"])
    return {**facts, **result, "flags": [*kind, f"--config.teacher.weights=…/{name}"]}


def table(rows: dict[str, dict]) -> str:
    """Return the rows as a Markdown table."""
    alone = rows[NONE]["estimated_cycles"]
    lines = [
        "| teacher | GMACs | features | step, M cycles | of it the teacher's |",
        "|---|---|---|---|---|",
        f"| none (or a label tape) | | | {alone / 1e6:.0f} | |",
    ]
    for name, row in rows.items():
        if name != NONE:
            cycles = row["estimated_cycles"]
            macs = f"{row['macs'] / 1e9:.1f}" if "macs" in row else ""
            share = f"{(cycles - alone) / cycles:.0%}"
            cells = [name, macs, str(row.get("features") or ""), f"{cycles / 1e6:.0f}", share]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Fill the file, then print the table."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    day = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument(
        "--out", type=Path, default=ROOT / f"benchmarks/results/teachers-{day}.json"
    )
    parser.add_argument("--folders", type=Path, default=ROOT / "runs" / "teachers")
    options = parser.parse_args()
    saved = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = saved.get("rows", {})
    known = {name: version(name) for name in ("jax", "libtpu", "torch", "timm", "torchax")}
    for name in (NONE, NATIVE, *TEACHERS):
        if name in rows:
            continue
        print(name, flush=True)
        try:
            rows[name] = measured(name, options.folders)
        except RuntimeError as error:  # the others can still be planned
            print(error, flush=True)
            continue
        content = {"topology": TOPOLOGY, "versions": known, "rows": rows}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
