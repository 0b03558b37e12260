"""Make run.tar.xz: to be run in a checkout of revision 4b8f892, whose modules it imports.

    PYTHONPATH=. python make.py FOLDER && tar cJf run.tar.xz -C FOLDER .

The paths in Orbax's commit_success.txt were cut to `RUN/…` afterwards, and their checksums renewed.
"""

import hashlib
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jaxlib
import numpy as np

OLD = {
    name: importlib.import_module(f"deit_jax.{name}")
    for name in ("train", "tape_command", "convert", "weights", "weight_files", "tape")
}
train = OLD["train"].train


def make_config():
    """Return the whole recipe around a student of two narrow blocks."""
    c = importlib.import_module("configs.base").get_config()
    c.batch_size, c.epochs = 16, 2.0
    c.data.source, c.data.eval_crop_ratio, c.data.eval_fraction = "digits", 1.0, 0.95
    c.data.threads, c.data.decoder, c.dtype = 1, "pillow", "float32"
    c.model.name = "deit_tiny_distilled_patch16_224"
    c.model.image_size, c.model.patch_size, c.model.width, c.model.depth = 16, 8, 12, 2
    c.teacher.model.name = "regnety_002"
    c.teacher.model.widths, c.teacher.model.depths = (8,), (1,)
    c.teacher.model.group_width, c.teacher.model.stem_width = 8, 8
    c.teacher.epochs, c.distill.kind = 1.0, "hard"
    c.mixing.group_size, c.augment.repeats = 8, 2
    c.optim.warmup_epochs, c.optim.lr, c.optim.ema_decay = 0.5, 1e-3, 0.9
    c.train.log_every_steps, c.train.eval_batch_size = 1, 256
    c.train.save_every_epochs, c.train.keep_checkpoints = 0.4, 1
    return c


def digest(tree) -> str:
    """Return a checksum of arrays by their paths, as tests/test_before.py has it."""
    total = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        array = np.ascontiguousarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n"
        total.update(name.encode())
        total.update(array.tobytes())
    return total.hexdigest()


def killed_run(out: Path) -> tuple[Path, int]:
    """Train a run to its end, then take it back to its fourth step as if it had been killed."""
    run, whole, config = out / "run", out / "whole", make_config()
    train(config, run)
    shutil.copy(run / "metrics.jsonl", out / "metrics.jsonl")
    config.train.keep_checkpoints = 9
    train(config, whole)
    last = 4
    for step in (run / "checkpoints").iterdir():
        shutil.rmtree(step)
    shutil.copytree(whole / "checkpoints" / str(last), run / "checkpoints" / str(last))
    for name in ("metrics.jsonl", "timing.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= last]
        (run / name).write_text("".join(kept))
    for place in (run, run / "teacher"):
        shutil.rmtree(place / "tensorboard")
        (place / "picture.png").unlink(missing_ok=True)
        lines = [json.loads(x) for x in (place / "history.jsonl").read_text().splitlines()]
        for line in lines:  # no name of a machine
            line.update({k: "elsewhere" for k in ("host", "command") if k in line})
        (place / "history.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (run / "results.json").unlink()
    return whole, last


def tapes(out: Path) -> dict[str, str]:
    """Record both kinds of tape, and train a student from the one of logits."""
    found = {}
    for kind in ("hard", "soft"):
        config, path = make_config(), out / f"tape_{kind}"
        config.distill.kind, config.teacher.weights = kind, str(out / "run" / "teacher")
        config.teacher.tape, config.teacher.tape_path = "record", str(path)
        if kind == "soft":
            config.distill.tau, config.teacher.tape_top_k = 3.0, 4
        OLD["tape_command"].record(config, out / "none")
        tape = OLD["tape"].Tape.open(path)
        found[kind] = digest([tape.signal(step, range(16)) for step in range(len(tape))])
    config.teacher.tape = "replay"
    train(config, out / "soft_run")
    shutil.copy(out / "soft_run" / "metrics.jsonl", out / "metrics_soft.jsonl")
    for name in ("soft_run", "none"):
        shutil.rmtree(out / name)
    return found


def main(out: Path) -> None:
    """Make everything, and facts.json."""
    whole, last = killed_run(out)
    taped, open_model = tapes(out), OLD["weights"].open_model
    opened, files = open_model(str(whole)), {}
    for name in ("timm.safetensors", "deit.pth", "huggingface"):
        OLD["convert"].convert(opened, out / name)
    for name in ("timm.safetensors", "huggingface"):
        files[name] = digest(open_model(str(out / name)).variables["params"])
    files["deit.pth"] = digest(dict(OLD["weight_files"].read(out / "deit.pth")))
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    run, teacher = (open_model(str(p)) for p in (out / "run", out / "run" / "teacher"))
    facts = {
        "jaxlib": jaxlib.__version__,
        "cpu": next(x.split(":")[1].strip() for x in processors if x.startswith("model name")),
        "step": last,
        "run": {"params": digest(run.variables["params"]), "teacher": digest(teacher.variables)},
        "final": {"params": digest(opened.variables["params"]), "ema": digest(opened.run.ema)},
        "files": files,
        "tapes": taped,
        "results": json.loads((whole / "results.json").read_text()),
    }
    shutil.rmtree(whole)
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
