"""Classify image files; the command `deit predict`."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax import checkpoint, cli, step
from deit_jax import config as config_lib
from deit_jax.data import decode
from deit_jax.errors import UserError

PREDICT_DOC = """usage: deit predict --weights=W [--topk=5] [--json] IMAGE ...

Print the most probable classes of each image. W is the workdir of a `deit train` run.

  deit predict --weights=runs/quickstart photo.jpg"""
BATCH = 32


def predict(weights: str, paths: list[str], topk: int = 5) -> list[dict[str, Any]]:
    """Return for each file {"image", "predictions": [{"class", "index", "probability"}, …]}.

    The probability is the softmax of the fused logits. Raise UserError naming a file that cannot
    be read before any result is computed.
    """
    run = checkpoint.load_run(weights)
    size, data = config_lib.image_size(run.config.model), run.config.data
    images = np.stack([_read(path, size, data.eval_crop_ratio) for path in paths])

    @jax.jit
    def probabilities(variables, images):
        heads = run.model.apply(variables, step.normalise(images, data.mean, data.std), train=False)
        return jax.nn.softmax(heads.fused())

    parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    scores = np.concatenate([probabilities(run.variables, jnp.asarray(part)) for part in parts])
    results = []
    for path, row in zip(paths, scores, strict=True):
        best = np.argsort(-row, kind="stable")[:topk]
        predictions = [
            {"class": run.classes[i], "index": int(i), "probability": float(row[i])} for i in best
        ]
        results.append({"image": path, "predictions": predictions})
    return results


def _read(path: str, size: int, crop_ratio: float) -> np.ndarray:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return np.asarray(decode.centre_crop(decode.decode(data, path), size, crop_ratio))


def main(argv: list[str]) -> None:
    """Run `deit predict`."""
    from absl import flags

    command = cli.Command("predict", PREDICT_DOC)
    flags.DEFINE_string("weights", "", "the workdir of a run", flag_values=command.flags)
    flags.DEFINE_integer("topk", 5, "classes to print", lower_bound=1, flag_values=command.flags)
    flags.DEFINE_boolean("json", False, "print one JSON object", flag_values=command.flags)
    paths = command.parse(argv, required=("weights",))
    if not paths:
        raise cli.UsageError("no image given; see `deit predict --help`")
    results = predict(command.flags.weights, paths, command.flags.topk)
    if command.flags.json:
        json.dump({"results": results}, sys.stdout)
        print()
        return
    for result in results:
        print(result["image"])
        for p in result["predictions"]:
            print(f"  {p['probability']:6.1%}  {p['class']}")
