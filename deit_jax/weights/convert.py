"""Bring weights from one format into another; the command `deit convert`."""

from collections.abc import Callable
from pathlib import Path

from deit_jax import cli, export, weights
from deit_jax.errors import UserError

CONVERT_DOC = """usage: deit convert SRC DST [--to=FORMAT] [--model=NAME] [--image_size=N] ...

Convert weights. SRC is a .pth or .safetensors file, a Hugging Face or timm folder, hf-hub:ORG/NAME
or the workdir of a run; its content tells which. DST is written as its name says, or as --to does:

  timm         *.safetensors    one file with timm's names
  deit         *.pth, *.pt      one PyTorch file as facebookresearch/deit writes it
  huggingface  another name     a folder for transformers
  deit_jax     only with --to   a workdir for `deit eval`, `deit predict` and teacher.weights

  deit convert runs/quickstart quickstart.safetensors
  deit convert hf-hub:facebook/deit-tiny-distilled-patch16-224 tiny.pth"""
WRITERS: dict[str, Callable[[weights.Opened, Path], None]] = {
    "timm": export.write_timm,
    "deit": export.write_deit,
    "huggingface": export.write_hugging_face,
    "deit_jax": export.write_run,
}
# How others load it: Python for people to copy.
CALLS = {"timm": export.timm_call, "huggingface": export.transformers_call}
SUFFIXES = {".safetensors": "timm", ".pth": "deit", ".pt": "deit"}


def convert(
    opened: weights.Opened, destination: str | Path, to: str | None = None, force: bool = False
) -> str:
    """Write opened weights and return the format; raise UserError where something is in the way."""
    path = Path(destination)
    asked, to = to, to or SUFFIXES.get(path.suffix, "huggingface")
    if to == "huggingface" and path.suffix[1:].isalpha() and not asked:
        known = ", ".join(SUFFIXES)
        raise UserError(
            f"{path}: files end in {known}; --to=huggingface makes a folder of any name"
        )
    endings = [suffix for suffix, kind in SUFFIXES.items() if kind == to]
    if endings and path.suffix not in endings:
        raise UserError(f"{path}: --to={to} makes one file; name it {path.name}{endings[0]}")
    # A checkpoint is never replaced: a workdir may hold a run that took days.
    if path.exists() and (not force or to == "deit_jax" or (path / "checkpoints").exists()):
        remedy = "choose another name" if force else "--force overwrites a file or a folder"
        raise UserError(f"{path} exists; {remedy}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[to](opened, path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return to


def main(argv: list[str]) -> None:
    """Run `deit convert`."""
    from absl import flags

    command = cli.Command("convert", CONVERT_DOC)
    own = {"flag_values": command.flags}
    flags.DEFINE_string("model", None, "SRC's model, where SRC does not say it", **own)
    flags.DEFINE_enum("to", None, list(WRITERS), "format of DST", **own)
    flags.DEFINE_integer("image_size", None, "resize the position embedding", **own)
    flags.DEFINE_integer("num_classes", None, "with --head=drop: classes of DST", **own)
    policies = "; ".join(f"{k} = {v}" for k, v in weights.HEAD_POLICIES.items())
    flags.DEFINE_enum("head", "error", list(weights.HEAD_POLICIES), policies, **own)
    flags.DEFINE_boolean("ema", False, "take a run's moving average of the weights", **own)
    flags.DEFINE_boolean("force", False, "overwrite DST", **own)
    words = command.parse(argv)
    if len(words) != 2:
        raise cli.UsageError("give SRC and DST; see `deit convert --help`")
    values = command.flags
    opened = weights.load_variables(
        words[0], values.model, values.num_classes, values.image_size, values.head, ema=values.ema
    )
    to = convert(opened, words[1], values.to, values.force)
    for note in opened.notes:
        print(note)
    what = f"{opened.name}, {len(opened.classes)} classes"
    print(f"{words[0]} ({opened.format}: {what}) -> {words[1]} ({to})")
    if to in CALLS and (call := CALLS[to](opened, Path(words[1]))):
        print(f"in Python: {call}")
