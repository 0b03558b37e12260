"""The figures of one or several runs, finished or under way; the command `deit analyze`.

`deit report` draws the very same figures. Nothing is written in a workdir.
"""

import dataclasses
import datetime
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deit_jax import analysis, answers, cli, model_views, optim, run_files
from deit_jax import config as config_lib
from deit_jax import teacher as teacher_lib
from deit_jax import weights as weights_lib
from deit_jax.data import pipeline
from deit_jax.data.sources import Dataset, open_dataset
from deit_jax.errors import UserError
from deit_jax.version import __version__

log = logging.getLogger("deit_jax")

ANALYZE_DOC = """usage: deit analyze --workdir=DIR[,DIR…] [--images=N] [--out=FILE]

Print the figures of one or several runs as JSON: curves, accuracies, confusion, mistakes, cosines
of the two tokens, attention maps, disagreement. The runs may be under way. docs/report.md lists the
keys; `deit report` draws them.

  deit analyze --workdir=runs/quickstart --out=figures.json"""
IMAGES = 5000
TOKEN_IMAGES = 128  # that the tokens' cosine is averaged over
ATTENTION_IMAGES = 5
TRIES = 3
_COMPUTED = (
    *("checkpoint_step", "total_steps", "steps_per_epoch", "evaluation", "tokens", "attention"),
    *("position_similarity", "patch_filters"),
)


@dataclasses.dataclass
class Analysis:
    """The figures, as `deit analyze` prints them, and for each run images by example number."""

    figures: dict[str, Any]
    pictures: list[dict[int, np.ndarray]]


@dataclasses.dataclass
class _Seen:
    """One run's figures and what they were made of."""

    figures: dict[str, Any]
    pictures: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    classes: list[str] | None = None
    said: answers.Answers | None = None


def analyze(workdirs: Sequence[str | Path], images: int = IMAGES) -> Analysis:
    """Return the figures of runs, evaluated on at most `images` evenly spaced held-out images.

    What cannot be computed, as without a checkpoint, is None, and the run's `notes` say why. Raise
    UserError if there is no run in one of the directories.
    """
    workdirs = [Path(w) for w in workdirs]
    names = run_files.names(workdirs)
    for workdir in workdirs:
        run_files.config_of(workdir)
    _leave_accelerator(workdirs)
    seen = [_run(w, name, images) for w, name in zip(workdirs, names, strict=True)]
    figures = {
        "deit_jax": __version__,
        "generated": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{jax.devices()[0].device_kind}",
        "runs": [s.figures for s in seen],
        "disagreement": disagreement(seen),
    }
    return Analysis(_finite(figures), [s.pictures for s in seen])


def _leave_accelerator(workdirs: Sequence[Path]) -> None:
    """Compute on the CPU while one of the runs trains here: it needs its accelerator for itself."""
    busy = [w for w in workdirs if run_files.under_way(w)]
    if busy:
        log.info("%s: a training is under way; the report is computed on the CPU", busy[0])
        jax.config.update("jax_platforms", "cpu")


def _run(workdir: Path, name: str, images: int) -> _Seen:
    figures = {"name": name, **run_files.read(workdir), **dict.fromkeys(_COMPUTED), "notes": {}}
    seen, notes = _Seen(figures), figures["notes"]
    try:
        opened = _open(workdir)
        figures["checkpoint_step"] = opened.run.step
        figures |= model_views.learned(opened)
    except UserError as error:
        opened, notes["checkpoint"] = None, str(error)
        if figures["step"] == 0 and (workdir / "teacher" / "config.json").is_file():
            notes["checkpoint"] += f"; its teacher is a run of its own, {workdir / 'teacher'}"
    try:
        dataset = open_dataset(config_lib.from_json(figures["config"]).data)
        _add_length(figures, dataset)
        if opened:
            _look(seen, opened, dataset, workdir, images)
    except (UserError, OSError) as error:
        notes["data"] = str(error)
    return seen


def _open(workdir: Path) -> weights_lib.Opened:
    """Return the newest checkpoint; a training may delete one while it is being read."""
    dtype = run_files.config_of(workdir)["dtype"]
    for _ in range(TRIES):
        before = _checkpoints(workdir)
        try:
            return weights_lib.open_model(workdir, dtype=dtype)
        except UserError as error:
            failure = error
            if _checkpoints(workdir) == before:
                break
    raise failure


def _checkpoints(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").glob("[0-9]*")}


def _add_length(figures: dict[str, Any], dataset: Dataset) -> None:
    config = config_lib.from_json(figures["config"])
    order = pipeline.EpochOrder(
        len(dataset.train), config.batch_size, config.augment.repeats, config.seed
    )
    figures["steps_per_epoch"] = order.steps_per_epoch
    figures["total_steps"] = optim.whole_steps(config.epochs, order.steps_per_epoch)


def _look(seen: _Seen, opened, dataset: Dataset, workdir: Path, images: int) -> None:
    """Add to a run's figures what needs its weights and its images."""
    if len(opened.classes) != len(dataset.classes):
        raise UserError(
            f"{opened.run.config.data.source}: has {len(dataset.classes)} classes now, the run was "
            f"trained with {len(opened.classes)}"
        )
    source, figures = dataset.eval, seen.figures
    numbers = answers.spaced(len(source), images)
    teacher = _teacher(opened, workdir, figures["notes"])
    said = answers.ask(opened, teacher, source, numbers, figures["name"])
    figures["evaluation"] = {
        "images": len(numbers),
        "of": len(source),
        "top1": answers.top1(said),
        **answers.errors(said, source, opened.classes),
    }
    few = numbers[answers.spaced(len(numbers), TOKEN_IMAGES)]
    figures["tokens"] = model_views.tokens(opened, answers.pixels(source, few, opened))
    shown = numbers[answers.spaced(len(numbers), ATTENTION_IMAGES)]
    photographs = answers.pixels(source, shown, opened)
    figures["attention"] = model_views.attention(opened, source, shown, photographs)
    wrong = [m["example"] for m in figures["evaluation"]["mistakes"]]
    pictures = [*photographs, *(answers.pixels(source, wrong, opened) if wrong else [])]
    seen.pictures = dict(zip([*map(int, shown), *wrong], pictures, strict=True))
    seen.classes, seen.said = opened.classes, said


def _teacher(opened, workdir: Path, notes: dict[str, str]):
    """Return the run's (teacher, params), None without one or where its weights are not found."""
    config = opened.run.config
    try:
        weights = teacher_lib.weights_path(config, workdir)
        return teacher_lib.load_teacher(config, weights, opened.classes) if weights else None
    except UserError as error:
        notes["teacher"] = str(error)
        return None


def disagreement(seen: Sequence[_Seen]) -> dict[str, Any] | None:
    """Return the share of images, in percent, on which each two classifiers of all runs differ.

    None unless all runs that were evaluated saw the same images of the same classes.
    """
    runs = [s for s in seen if s.said]
    if not runs or not all(_comparable(runs[0], other) for other in runs[1:]):
        return None
    classifiers, labels = [], {}
    for run in runs:
        single = "dist" not in run.said.labels  # whose fused prediction is the class head's
        for head in ("teacher", "cls", "dist", *(() if single else ("fused",))):
            if head in run.said.labels:
                classifiers.append({"run": run.figures["name"], "head": head})
                labels[str(len(labels))] = run.said.labels[head]
    return {
        "images": len(runs[0].said.numbers),
        "classifiers": classifiers,
        "percent": (100 * analysis.disagreement(labels)).tolist(),
    }


def _comparable(first: _Seen, second: _Seen) -> bool:
    """Return whether two runs answered about the same images, with labels of the same meaning."""
    fields = ("source", "eval_split", "eval_fraction")
    return (
        first.classes == second.classes
        and np.array_equal(first.said.numbers, second.said.numbers)
        and np.array_equal(first.said.truth, second.said.truth)
        and all(
            first.figures["config"]["data"][k] == second.figures["config"]["data"][k]
            for k in fields
        )
    )


def _finite(value: Any) -> Any:
    """Return figures with None for every number that is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: str | Path, text: str) -> None:
    """Write what --out names; characters that UTF-8 cannot hold, as in odd file names, are `?`."""
    try:
        Path(path).write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written ({error.strerror})") from error


def add_flags(command: cli.Command) -> None:
    """Define the flags that `deit analyze` and `deit report` share."""
    from absl import flags

    own = {"flag_values": command.flags}
    flags.DEFINE_list("workdir", None, "a run, or several with commas between them", **own)
    flags.DEFINE_integer(
        "images", IMAGES, "evaluate on at most so many images, evenly spaced", lower_bound=1, **own
    )


def main(argv: list[str]) -> None:
    """Run `deit analyze`."""
    from absl import flags

    command = cli.Command("analyze", ANALYZE_DOC)
    add_flags(command)
    flags.DEFINE_string("out", "", "write the JSON to this file", flag_values=command.flags)
    flags.DEFINE_boolean("json", True, "what it prints in any case", flag_values=command.flags)
    cli.no_words(command.parse(argv, required=("workdir",)))
    values = command.flags
    text = json.dumps(analyze(values.workdir, values.images).figures, allow_nan=False) + "\n"
    if values.out:
        write(values.out, text)
        log.info("figures: %s", values.out)
    else:
        sys.stdout.write(text)
