"""The quickstart student's training step on a CPU, beside the same model in PyTorch.

    python -m benchmarks.cpu [--out=FILE.json]

Both train the 32-pixel DeiT of configs/quickstart.py in float32 on all cores, 96 images that are in
memory, the teacher's labels given: forward, hard distillation, backward, AdamW. Ours is the step of
`deit train` on a label tape, which also erases, mixes, averages the weights and checks its loss;
PyTorch's is timm's distilled DeiT, eager and through torch.compile. Turns alternate; ratios are of
neighbours. All have large pages of memory, as with `deit train`; GLIBC_TUNABLES= takes them away.
On a processor with AVX-512, benchmarks/avx2.py stands in for one without.
"""

import argparse
import datetime
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import gpu_torch
from benchmarks.gpu_torch import timm, torch
from deit_jax.cli import huge_pages, platforms
from deit_jax.configs import quickstart
from deit_jax.data.sources.registry import open_dataset
from deit_jax.perf.step_time import random_batch
from deit_jax.train.experiment import resolve
from deit_jax.train.loop import Trainer

TURNS, STEPS = 9, 20


def ours(config, dataset, folder: str):
    """Return a function that takes so many steps of `deit train`."""
    experiment = resolve(config, len(dataset.classes), len(dataset.train))
    trainer = Trainer(experiment, Path(folder), dataset)
    batch = random_batch(experiment)

    def steps(count: int) -> None:
        for _ in range(count):
            trainer.state, values = trainer.step(trainer.state, None, batch)
        jax.block_until_ready(values)
        jax.block_until_ready(trainer.state)

    return steps


def theirs(config, classes: int, compiled: bool):
    """Return a function that takes so many steps of timm's model."""
    m = config.model
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=m.image_size,
        patch_size=m.patch_size,
        embed_dim=m.width,
        depth=m.depth,
        num_classes=classes,
    ).train()
    model.set_distilled_training(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.optim.lr, weight_decay=0.05, fused=True
    )
    shape = (config.batch_size, 3, m.image_size, m.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    labels, hard = torch.randint(0, classes, (2, config.batch_size))
    normalise, entropy = gpu_torch.normaliser(), torch.nn.functional.cross_entropy

    def loss_of(images, labels, hard):
        cls, dist = model(normalise(images))
        return 0.5 * entropy(cls, labels, label_smoothing=0.1) + 0.5 * entropy(dist, hard)

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def steps(count: int) -> None:
        for _ in range(count):
            loss_of(images, labels, hard).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps


def processor() -> str:
    """Return its name, as Linux has it; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "")


def turn(steps) -> float:
    """Return the milliseconds of a step."""
    began = time.perf_counter()
    steps(STEPS)
    return 1e3 * (time.perf_counter() - began) / STEPS


def main() -> None:
    """Measure, print and, if asked, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the figures to this file")
    out = parser.parse_args().out
    platforms.choose()
    huge_pages.restart()
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    config = quickstart.get_config()
    config.teacher.tape, config.teacher.tape_path = "replay", "given"
    dataset = open_dataset(config.data)
    with tempfile.TemporaryDirectory() as folder:
        peers = {
            "ours": ours(config, dataset, folder),
            "eager": theirs(config, len(dataset.classes), compiled=False),
        }
        if " " not in f"{torch.__file__}{os.environ.get('TORCHINDUCTOR_CACHE_DIR', '')}":
            peers["compile"] = theirs(config, len(dataset.classes), compiled=True)
        else:
            print("no row for torch.compile: its linker cannot work from a path with a space")
        for steps in peers.values():
            steps(3)  # compile, and reach a steady state
        times = {name: [] for name in peers}
        for _ in range(TURNS):
            for name, steps in peers.items():
                times[name].append(turn(steps))
    result = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    result |= {"processor": processor(), "vectors": torch.backends.cpu.get_cpu_capability()}
    result |= {"cores": torch.get_num_threads(), "steps_per_turn": STEPS, "turns": TURNS}
    result["memory"] = os.environ.get(huge_pages.VARIABLE, "")
    result |= {"jax": jax.__version__, "torch": torch.__version__, "timm": timm.__version__}
    result["step_ms"] = {name: round(float(np.median(t)), 2) for name, t in times.items()}
    for name in [name for name in times if name != "ours"]:
        ratios = np.divide(times[name], times["ours"])
        low, middle, high = np.percentile(ratios, (10, 50, 90)).round(2).tolist()
        result[f"times_faster_than_{name}"] = {"median": middle, "p10": low, "p90": high}
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        Path(out).write_text(text + "\n")


if __name__ == "__main__":
    main()
