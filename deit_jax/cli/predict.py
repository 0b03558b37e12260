"""`deit predict`: classify images."""

import contextlib
import sys

from deit_jax.cli import rows
from deit_jax.cli.flags import Command, UsageError, add_checkpoint_flags
from deit_jax.errors import UserError
from deit_jax.weights.pretrained import PRETRAINED

PREDICT_DOC = """usage: deit predict (--weights=W | --model=NAME) [--topk=5] [--out=FILE] IMAGES ...

Print the most probable classes of each image; of weights trained with several labels an image, the
probability of each class by itself (--multi_label says so of a file that does not). W is the
workdir of a `deit train` run, a .pth or .safetensors file, a Hugging Face or timm folder, or
hf-hub:ORG/NAME; without it the weights published for NAME are taken.

IMAGES are files, folders with all that is below them, patterns, or - for paths on stdin, one a
line; --list=FILE names a file of such lines. They are read in batches, so that there may be any
number. One that cannot be read is named and left out, and the exit code is then 1.

  deit predict --weights=runs/quickstart photo.jpg
  deit predict --weights=deit_tiny_patch16_224-a1311bcf.pth photos/ --out=answers.csv
  find . -name '*.jpg' | deit predict --model=deit_small_distilled_patch16_224 --format=jsonl -"""


def main(argv: list[str]) -> None:
    """Run `deit predict`."""
    command = Command("predict", PREDICT_DOC)
    command.string("weights", "", "a run, file, folder or hf-hub: id")
    command.string("model", None, "name of the weights' model, or whose published ones to take")
    command.integer("topk", 5, "classes to print", lower_bound=1)
    command.boolean("multi_label", False, "each class has a probability of its own")
    add_checkpoint_flags(command)
    command.string("list", "", "file with paths of images, one a line; - is stdin")
    command.string("out", "", "write to this file; .csv, .jsonl, .json and .txt tell the format")
    forms = "; ".join(f"{k} = {v}" for k, v in rows.FORMATS.items())
    command.choice("format", None, rows.FORMATS, forms)
    command.boolean("json", False, "the same as --format=json")
    words = command.parse(argv)
    values = command.flags
    if not values.weights and not values.model:
        raise UsageError("--weights=… is missing; see `deit predict --help`")
    if not words and not values.list:
        raise UsageError("no image given; see `deit predict --help`")
    if values.json and values.format not in (None, "json"):
        raise UsageError(f"--json and --format={values.format}: give one of them")
    form = rows.format_of(values.out, "json" if values.json else values.format)
    from deit_jax.analysis.classify import open_classifier, predictions, unreadable_line
    from deit_jax.data.sources.named import named_images

    source, which = values.weights or PRETRAINED, (values.checkpoint, values.ema)
    opened = open_classifier(source, values.model, values.multi_label, *which)
    images = named_images(words, opened.reading.channels, values.list)
    topk = min(values.topk, len(opened.classes))
    answered = bytearray(len(images))
    # A bar and the answers would be in each other's way on a terminal.
    title = "" if not values.out and sys.stdout.isatty() else "predict"
    with contextlib.closing(rows.Out(values.out)) as file:
        out = rows.Predictions(file, form, topk)
        for number, result in predictions(opened, images, topk, values.multi_label, title):
            answered[number] = 1
            out.write(result)
        missing = [images.describe(i) for i, done in enumerate(answered) if not done]
        out.end(missing)
    if missing:
        raise UserError(unreadable_line(missing, len(images)))
