"""`deit eval`: top-1 and top-5 of each head on a data set."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from deit_jax.analysis.choices import PROBES
from deit_jax.cli import rows
from deit_jax.cli.flags import ALL, Command, UsageError, add_checkpoint_flags, no_words
from deit_jax.config.serialize import from_json
from deit_jax.errors import UserError
from deit_jax.storage import to_path
from deit_jax.weights.pretrained import PRETRAINED
from deit_jax.workdir import records
from deit_jax.workdir.which import kept_steps

EVAL_DOC = """usage: deit eval --workdir=DIR [--config=FILE[:ARGS]]
       deit eval (--weights=W | --model=NAME) --config=FILE[:ARGS]

Evaluate a trained model on the config's evaluation data, every example once; without --config, on
those that the run was trained with. W is the workdir of a run, a .pth or .safetensors file, a
Hugging Face or timm folder, or hf-hub:ORG/NAME; without it the weights published for NAME are
taken. Size, crop, mean and std of the images are those of the weights, unless --config.model.
image_size or --config.data.eval_crop_ratio, mean or std are given; what they are is said.

  deit eval --workdir=runs/quickstart
  deit eval --workdir=runs/deit_s --config=configs/deit.py --config.data.dir=/elsewhere
  deit eval --model=deit_small_patch16_224 --config=configs/deit.py --out=answers.csv
  deit eval --workdir=runs/deit_s --checkpoint=all
  deit eval --workdir=runs/deit_s --probe=knn"""


def main(argv: list[str]) -> None:
    """Run `deit eval`."""
    command = Command("eval", EVAL_DOC)
    command.add_config(argv)
    command.string("workdir", "", "evaluate the run in it")
    command.string("weights", "", "evaluate these weights")
    command.string("model", None, "name of the weights' model, or whose published ones to take")
    add_checkpoint_flags(command, every=True)
    command.string("out", "", "csv file of path, label, and each head's answer and probability")
    command.string("real_labels", "", "ReaL's real.json: also top-1 by all labels of each image")
    what = "the heads' place is taken by a classifier of their features: "
    command.choice("probe", None, PROBES, what + " or ".join(PROBES.values()))
    command.boolean("json", False, "print one JSON object")
    no_words(command.parse(argv))
    values = command.flags
    source = values.workdir or values.weights or (PRETRAINED if values.model else "")
    every = values.checkpoint == ALL
    if not source or (values.workdir and values.weights):
        raise UsageError("give either --workdir=DIR or --weights=W")
    if values.probe and (values.out or values.real_labels):
        raise UsageError("--probe asks no head: leave out --out and --real_labels")
    if every and (values.out or not values.workdir):
        raise UsageError("--checkpoint=all is for the --workdir of a run, and without --out")
    config = command.config
    if config is None:
        if not values.workdir:
            raise UsageError("--weights=W needs the data: --config=FILE")
        config = from_json(records.config_of(to_path(values.workdir)))
    from deit_jax.analysis.evaluate import open_evaluation
    from deit_jax.analysis.probe import probe

    said = []
    for step in _steps(values.workdir) if every else [values.checkpoint]:
        which = (command.given(), step, values.ema)
        evaluation = open_evaluation(config, source, values.model, *which, not values.probe)
        if values.probe:
            results = probe(evaluation, values.probe)
        else:
            results = _results(evaluation, values.out, values.real_labels)
        said.append({**results, "input": evaluation.input()})
        if not values.json:
            print(_text(said[-1]), flush=True)
    if values.json:
        json.dump({"checkpoints": said} if every else said[0], sys.stdout)
        print()


def _steps(workdir: str) -> list[int]:
    if steps := kept_steps(workdir):
        return steps
    raise UserError(f"{workdir}: no checkpoint yet; let `deit train` save one first")


def _results(evaluation, out: str, real_labels: str) -> dict[str, Any]:
    """Return the figures, and write what each head says of each image."""
    if (out or real_labels) and evaluation.data.multi_label:
        flag = "--out" if out else "--real_labels"
        raise UserError(f"{flag}: is for images of one class each; leave it out")
    if out and Path(out).suffix != ".csv":
        raise UserError(f"--out={out}: answers are a .csv file; name it so")
    from deit_jax.analysis.real_labels import RealLabels
    from deit_jax.cli.answers import Answers

    watching: list[Any] = []
    with contextlib.ExitStack() as stack:
        real = RealLabels(real_labels, evaluation.dataset) if real_labels else None
        if real:
            watching.append(real.watch)
        if out:
            file = stack.enter_context(contextlib.closing(rows.Out(out)))
            watching.append(Answers(file, evaluation.dataset).watch)

        def watch(*answers) -> None:
            for each in watching:
                each(*answers)

        results = evaluation.results(watch if watching else None)
    return {**results, "real_labels": real.results()} if real else results


def _text(results: dict[str, Any]) -> str:
    """Return the figures as lines for people, the input first."""
    from deit_jax.train.evaluator import NAMES, table

    given = results["input"]
    size, ratio = given["image_size"], given["crop_ratio"]
    shape = f"{size[0]} x {size[1]}" if isinstance(size, list) else f"{size} x {size}"
    crop = f"crop {ratio:g}" if ratio else given["resize"]
    mean, std = (", ".join(f"{x:g}" for x in given[key]) for key in ("mean", "std"))
    step = f"step {results['step']}: " if "step" in results else ""
    lines = [f"{step}images of {shape} pixels, {crop}, mean {mean}, std {std}"]
    if found := results.get("probe"):
        lines.append(f"{results['examples']} examples, {found['train_examples']} to learn from")
        lines.append(f"{'':24}{'top-1 %':>9}{'top-5 %':>9}")
        lines.append(f"{found['kind'] + ' on features':24}{found['top1']:9.2f}{found['top5']:9.2f}")
        return "\n".join(lines)
    lines.append(table(results))
    if real := results.get("real_labels"):
        lines += ["", f"{real['examples']} examples with ReaL's labels", f"{'':24}{'top-1 %':>9}"]
        lines += [f"{NAMES[k]:24}{real[k]['top1']:9.2f}" for k in NAMES if k in real]
    return "\n".join(lines)
