"""Classify image files; the command `deit predict`."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax import cli, step, weights
from deit_jax.data import decode
from deit_jax.errors import UserError

PREDICT_DOC = """usage: deit predict --weights=W [--model=NAME] [--topk=5] [--json] IMAGE ...

Print the most probable classes of each image. W is the workdir of a `deit train` run, a .pth or
.safetensors file, a Hugging Face or timm folder, or hf-hub:ORG/NAME.

  deit predict --weights=runs/quickstart photo.jpg
  deit predict --weights=deit_tiny_patch16_224-a1311bcf.pth photo.jpg"""
BATCH = 32


def predict(
    source: str, paths: list[str], topk: int = 5, model: str | None = None
) -> list[dict[str, Any]]:
    """Return for each file {"image", "predictions": [{"class", "index", "probability"}, …]}.

    The probability is the softmax of the fused logits. `model` is the name of the weights' model if
    they do not say it. Raise UserError naming a file that cannot be read before any result is
    computed.
    """
    opened = weights.open_model(source, model)
    images = np.stack([_read(path, opened.image_size, opened.crop_ratio) for path in paths])

    @jax.jit
    def probabilities(variables, images):
        images = step.normalise(images, opened.mean, opened.std)
        return jax.nn.softmax(opened.model.apply(variables, images, train=False).fused())

    parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    scores = np.concatenate([probabilities(opened.variables, jnp.asarray(x)) for x in parts])
    results = []
    for path, row in zip(paths, scores, strict=True):
        best = np.argsort(-row, kind="stable")[:topk]
        predictions = [
            {"class": opened.classes[i], "index": int(i), "probability": float(row[i])}
            for i in best
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
    flags.DEFINE_string(
        "weights", "", "a run, file, folder or hf-hub: id", flag_values=command.flags
    )
    flags.DEFINE_string("model", None, "name of the weights' model", flag_values=command.flags)
    flags.DEFINE_integer("topk", 5, "classes to print", lower_bound=1, flag_values=command.flags)
    flags.DEFINE_boolean("json", False, "print one JSON object", flag_values=command.flags)
    paths = command.parse(argv, required=("weights",))
    if not paths:
        raise cli.UsageError("no image given; see `deit predict --help`")
    values = command.flags
    results = predict(values.weights, paths, values.topk, values.model)
    if values.json:
        json.dump({"results": results}, sys.stdout)
        print()
        return
    for result in results:
        print(result["image"])
        for p in result["predictions"]:
            print(f"  {p['probability']:6.1%}  {p['class']}")
