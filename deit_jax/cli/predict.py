"""`deit predict`: classify image files."""

import json
import sys

from deit_jax.analysis.classify import classify
from deit_jax.cli.flags import Command, UsageError

PREDICT_DOC = """usage: deit predict --weights=W [--model=NAME] [--topk=5] [--json] IMAGE ...

Print the most probable classes of each image; of weights trained with several labels an image, the
probability of each class by itself (--multi_label says so of a file that does not). W is the
workdir of a `deit train` run, a .pth or .safetensors file, a Hugging Face or timm folder, or
hf-hub:ORG/NAME.

  deit predict --weights=runs/quickstart photo.jpg
  deit predict --weights=deit_tiny_patch16_224-a1311bcf.pth photo.jpg"""


def main(argv: list[str]) -> None:
    """Run `deit predict`."""
    command = Command("predict", PREDICT_DOC)
    command.string("weights", "", "a run, file, folder or hf-hub: id")
    command.string("model", None, "name of the weights' model")
    command.integer("topk", 5, "classes to print", lower_bound=1)
    command.boolean("multi_label", False, "each class has a probability of its own")
    command.boolean("json", False, "print one JSON object")
    paths = command.parse(argv, required=("weights",))
    if not paths:
        raise UsageError("no image given; see `deit predict --help`")
    values = command.flags
    results = classify(values.weights, paths, values.topk, values.model, values.multi_label)
    if values.json:
        json.dump({"results": results}, sys.stdout)
        print()
        return
    for result in results:
        print(result["image"])
        for p in result["predictions"]:
            print(f"  {p['probability']:6.1%}  {p['class']}")
