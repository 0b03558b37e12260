"""`deit convert`: weights from one format into another."""

from pathlib import Path

from deit_jax.cli.flags import Command, UsageError, add_checkpoint_flags
from deit_jax.weights.convert import EXPORTERS, convert
from deit_jax.weights.fit import HEAD_POLICIES
from deit_jax.weights.load import load_variables

CONVERT_DOC = """usage: deit convert SRC DST [--to=FORMAT] [--model=NAME] [--image_size=N|H,W] ...

Convert weights. SRC is the workdir of a run, a PyTorch checkpoint, .safetensors, .npz (big_vision,
vision_transformer) or Flax msgpack file, a Hugging Face or timm folder, an Orbax checkpoint or
hf-hub:ORG/NAME; its content tells which. The model is found in it by its names; where there are
several, SRC::KEY says which, as in dino.pth::student. DST is written as its name says, or as --to:

  timm         *.safetensors    one file with timm's names
  deit         *.pth, *.pt      one PyTorch file as facebookresearch/deit writes it
  huggingface  another name     a folder for transformers
  deit_jax     only with --to   a workdir for `deit eval`, `deit predict` and teacher.weights

  deit convert runs/quickstart quickstart.safetensors
  deit convert hf-hub:facebook/deit-tiny-distilled-patch16-224 tiny.pth"""


def main(argv: list[str]) -> None:
    """Run `deit convert`."""
    command = Command("convert", CONVERT_DOC)
    command.string("model", None, "SRC's model, where SRC does not say it")
    command.choice("to", None, list(EXPORTERS), "format of DST")
    command.size("image_size", "resize the position embedding for it: N, or HEIGHT,WIDTH")
    command.integer("num_classes", None, "with --head=drop: classes of DST")
    policies = "; ".join(f"{k} = {v}" for k, v in HEAD_POLICIES.items())
    command.choice("head", "error", list(HEAD_POLICIES), policies)
    add_checkpoint_flags(command)
    command.boolean("force", False, "overwrite DST")
    words = command.parse(argv)
    if len(words) != 2:
        raise UsageError("give SRC and DST; see `deit convert --help`")
    values = command.flags
    shape = (values.model, values.num_classes, values.image_size, values.head)
    opened = load_variables(words[0], *shape, ema=values.ema, checkpoint=values.checkpoint)
    to = convert(opened, words[1], values.to, values.force)
    for note in opened.notes:
        print(note)
    what = f"{opened.name}, {len(opened.classes)} classes"
    print(f"{words[0]} ({opened.format}: {what}) -> {words[1]} ({to})")
    if call := EXPORTERS[to].call(opened, Path(words[1])):
        print(f"in Python: {call}")
