"""`deit export`: a model as a program that runs without this code."""

import dataclasses
import json
import sys

from deit_jax.cli.flags import Command, UsageError, add_checkpoint_flags
from deit_jax.export.choices import DTYPES, FORMATS, HEADS, INPUTS, LAYOUTS, PLATFORMS, Options
from deit_jax.storage import to_path

EXPORT_DOC = """usage: deit export SRC DST [--to=stablehlo|onnx|savedmodel] [--preprocess] ...

Write a model as a program that runs without this code. SRC is whatever `deit predict` takes: the
workdir of a run, a file, a folder or hf-hub:ORG/NAME. DST is

  onnx        *.onnx    for onnxruntime and what else reads ONNX (extra `onnx`, and jax2onnx)
  stablehlo   a folder  for jax.export and XLA on a CPU, GPU or TPU, whichever machine wrote it
  savedmodel  a folder  for TensorFlow, TF Serving and LiteRT's converter (extra `savedmodel`)

The program takes normalised images, or bytes with --input=uint8, or with --preprocess the bytes of
a whole image of any size, which it resizes and crops itself. The names of the classes and all that
is to be known of images are in it as metadata. It is run again by its own runtime, and not written
if its answers are not the model's. docs/export.md has a few lines of Python for each.

  deit export runs/quickstart student.onnx
  deit export runs/quickstart student --to=stablehlo --preprocess --heads=apart"""


def main(argv: list[str]) -> None:
    """Run `deit export`."""
    command = Command("export", EXPORT_DOC)
    command.choice("to", None, FORMATS, "format of DST, where its name does not say it")
    command.string("model", None, "SRC's model, where SRC does not say it")
    command.choice("heads", "fused", HEADS, "; ".join(f"{k} = {v}" for k, v in HEADS.items()))
    inputs = "; ".join(f"{k} = {v}" for k, v in INPUTS.items())
    command.choice("input", "normalised", INPUTS, inputs)
    command.boolean("preprocess", False, "take whole images as bytes: resize, crop and normalise")
    command.choice("layout", "NHWC", LAYOUTS, "order of the images' axes")
    command.choice("dtype", "float32", DTYPES, "of weights and computing; answers are float32")
    command.integer("batch", None, "images a call; any number if not given", lower_bound=1)
    command.words("platforms", list(PLATFORMS), "of stablehlo and savedmodel")
    command.integer("opset", None, "of ONNX; 20 if not given", lower_bound=17)
    command.boolean("multi_label", False, "each class has a probability of its own")
    command.boolean("verify", True, "run the program again and compare its answers")
    add_checkpoint_flags(command)
    command.boolean("force", False, "overwrite DST")
    command.boolean("json", False, "print what was written as JSON")
    words = command.parse(argv)
    if len(words) != 2:
        raise UsageError("give SRC and DST; see `deit export --help`")
    values, path = command.flags, to_path(words[1])
    given = {f.name: getattr(values, f.name) for f in dataclasses.fields(Options)}
    options = Options(**given | {"platforms": tuple(values.platforms)})
    _check(values)
    from deit_jax.analysis.classify import open_classifier
    from deit_jax.export.write import check_packages, export, format_of

    to = format_of(path, values.to)
    check_packages(to)
    _check_format(values, to)
    opened = open_classifier(
        words[0], values.model, values.multi_label, values.checkpoint, values.ema
    )
    if values.multi_label:
        opened = dataclasses.replace(opened, multi_label=True)
    made = export(opened, path, to, options, values.verify, values.force)
    if values.json:
        json.dump({"out": str(path), **dataclasses.asdict(made)}, sys.stdout)
        print()
        return
    with_ = ", ".join(f"{k} {v}" for k, v in made.made_with.items())
    print(f"{words[0]} ({opened.name}) -> {path} ({to}, {made.bytes:,} bytes; {with_})")
    images, classes = made.described["input"], len(opened.classes)
    shape = " ".join(map(str, images["shape"]))
    outputs = ", ".join(made.described["outputs"])
    print(f"images {images['dtype']} [{shape}] -> {outputs} [b {classes}]")
    _tell(made.verified)


def _tell(verified) -> None:
    if verified is None:
        print("not verified")
        return
    print(
        f"run again: {verified.images} images, answers within {verified.difference:.1g} of the "
        f"largest ({verified.allowed:g} allowed)"
    )
    if verified.of_predict is not None:
        print(f"`deit predict`, which rounds pixels: {verified.of_predict:.1g} apart at most")


def _check(values) -> None:
    """Raise UsageError for flags that contradict each other."""
    given = values.platforms
    if not given or not set(given) <= set(PLATFORMS) or len(set(given)) < len(given):
        said = ",".join(given)
        raise UsageError(f"--platforms={said}: choose among {', '.join(PLATFORMS)}, each once")


def _check_format(values, to: str) -> None:
    """Raise UsageError for flags that mean nothing to a format."""
    if values.opset is not None and to != "onnx":
        raise UsageError(f"--opset is of ONNX; leave it out with --to={to}")
    if to == "savedmodel":
        _check_tensorflow(values)
    if values["platforms"].present and to == "onnx":
        raise UsageError("--platforms: an ONNX file is for all; leave it out")


def _check_tensorflow(values) -> None:
    """Raise UsageError for platforms that TensorFlow does not name, or cannot run here."""
    said = f"--platforms={','.join(values.platforms)}"
    if values.platforms == ["rocm"]:
        raise UsageError(f"{said}: TensorFlow has cpu, cuda and tpu")
    if values.verify and "cpu" not in values.platforms:
        raise UsageError(f"{said}: a SavedModel is verified on the CPU; add cpu, or --noverify")
