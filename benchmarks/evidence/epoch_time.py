"""Wall time of an epoch of the recipe, in timm and PyTorch and in ours: input, step, both.

    python benchmarks/evidence/epoch_time.py [--cores=1] [--out=FILE.json]

The same images, sizes and kind of teacher as frameworks.py, with random weights. Input alone is the
loader, emptied as fast as it can; step alone an update on a batch that is there, for timm with
mixup, in ours with erasing and mixing; an epoch is updates fed by the loader, as in a run. All in
one process on so many cores; turns alternate, and ratios are of neighbours.
"""

import argparse
import contextlib
import itertools
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

STEPS, TURNS = 30, 7


def options() -> argparse.Namespace:
    """Read the command line and keep to the cores that it allows, before anything counts them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="try it: two steps, one turn")
    parser.add_argument("--data", default="", help="folder of the idx files, if not Debian's")
    parser.add_argument("--out", help="write the figures to this file")
    found = parser.parse_args()
    if not 1 <= found.cores <= (os.cpu_count() or 1):
        parser.error(f"--cores={found.cores}: this machine has {os.cpu_count()}")
    # study.py keeps XLA to one thread, for runs of the same bits; a run by itself has all cores.
    os.environ.setdefault("XLA_FLAGS", "")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: found.cores])
    return found


class Ours:
    """The step and the input of `deit train`."""

    def __init__(self, config, dataset, folder: Path):
        import jax

        from deit_jax.perf.step_time import random_batch
        from deit_jax.train.experiment import resolve
        from deit_jax.train.loop import Trainer

        self.jax = jax
        self.experiment = resolve(config, len(dataset.classes), len(dataset.train))
        teacher = self.experiment.random_teacher()
        self.trainer = Trainer(self.experiment, folder, dataset, teacher)
        self.batch = random_batch(self.experiment)

    def loaded(self):
        """Return an iterator of batches, with the threads that make them."""
        batches = self.experiment.loaded(self.trainer.batches(), 0, 2**31)
        return contextlib.closing(batches)

    def input(self, loader, count: int) -> None:
        """Take so many batches."""
        for _ in itertools.islice(loader, count):
            pass

    def update(self, batch) -> None:
        """Take a step and wait for its end; a run would load and place the next batch meanwhile."""
        trainer = self.trainer
        trainer.state, values = trainer.step(trainer.state, trainer.teacher_params, batch)
        self.jax.block_until_ready(values)

    def step(self, count: int) -> None:
        """Take so many steps on one batch."""
        for _ in range(count):
            self.update(self.batch)

    def epoch(self, loader, count: int) -> None:
        """Take so many steps on batches of the loader."""
        for batch in itertools.islice(loader, count):
            self.update(self.experiment.on_devices(batch))


class Theirs:
    """timm's loader and task."""

    def __init__(self, config, dataset, network, cores: int):
        import timm_side

        timm_side.torch.set_num_threads(cores)
        self.run = timm_side.Training(config, dataset, network, workers=cores - 1)
        with self.loaded() as loader:
            self.batch = next(loader)

    def loaded(self):
        """Return an iterator of batches that starts again at the end of an epoch."""
        batches = itertools.chain.from_iterable(itertools.repeat(self.run.loader))
        return contextlib.nullcontext(batches)

    input = Ours.input

    def step(self, count: int) -> None:
        """Take so many steps on one batch."""
        for _ in range(count):
            self.run.update(*self.batch)

    def epoch(self, loader, count: int) -> None:
        """Take so many steps on batches of the loader."""
        for batch in itertools.islice(loader, count):
            self.run.update(*batch)


def turn(peer, steps: int) -> dict[str, float]:
    """Return the seconds of a step's input, of the step, and of both in a run.

    The first batches of a loader are not timed: they are ahead, or start its workers.
    """
    clock, times = time.perf_counter, {}
    with peer.loaded() as loader:
        peer.input(loader, 10)
        began = clock()
        peer.input(loader, steps)
        times["input"] = (clock() - began) / steps
    began = clock()
    peer.step(steps)
    times["step"] = (clock() - began) / steps
    with peer.loaded() as loader:
        peer.epoch(loader, 10)
        began = clock()
        peer.epoch(loader, steps)
        times["epoch"] = (clock() - began) / steps
    return times


def measure(found: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return the seconds of a step in every turn of both."""
    import timm_side
    from frameworks import OURS
    from study import SCALES, finish, open_dataset, student_config, subset, teacher_config

    scale = SCALES["toy" if found.toy else "cpu"]
    data = subset(scale, found.data, folder / "data")
    config = finish(student_config(scale, data), scale.images, 0)
    config.update_from_flattened_dict(OURS.changes)
    config.data.threads = 0  # as many as help, the default
    config.teacher.model = teacher_config("convnet", scale, data).model
    config.teacher.weights = "random"
    dataset = open_dataset(config.data)
    network = timm_side.Convnet(config.teacher.model, len(dataset.classes))
    peers = {
        "timm": Theirs(config, dataset, network, found.cores),
        "ours": Ours(config, dataset, folder / "run"),
    }
    times = {name: [] for name in peers}
    for number in range(2 if found.toy else TURNS + 1):
        for name, peer in peers.items():
            taken = turn(peer, 2 if found.toy else STEPS)
            if number:  # the first compiles
                times[name].append(taken)
    return times


def main() -> None:
    """Measure, print and, if asked, write."""
    found = options()
    import numpy as np
    from study import SCALES, huge_pages, platforms
    from study import conditions as run_conditions

    platforms.choose()
    huge_pages.restart()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(found, Path(folder))
    scale = SCALES["cpu"]
    steps = scale.images // scale.batch
    result = run_conditions() | {name: version(name) for name in ("torch", "timm")}
    result |= {"images": steps * scale.batch, "seconds_an_epoch": {}, "times_faster": {}}
    for part in ("input", "step", "epoch"):
        of = {name: [t[part] for t in turns] for name, turns in times.items()}
        result["seconds_an_epoch"][part] = {
            name: round(float(np.median(t)) * steps, 2) for name, t in of.items()
        }
        low, middle, high = np.percentile(np.divide(of["timm"], of["ours"]), (10, 50, 90))
        result["times_faster"][part] = {
            "median": round(middle, 2),
            "p10": round(low, 2),
            "p90": round(high, 2),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if found.out:
        Path(found.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
