"""`deit convert`: weights from one format into another."""

from pathlib import PurePath

from deit_jax.cli.flags import Command, UsageError, add_checkpoint_flags
from deit_jax.errors import UserError
from deit_jax.storage import backend, exists, to_path
from deit_jax.weights.choices import HEAD_POLICIES
from deit_jax.weights.exporters import EXPORTERS
from deit_jax.workdir.which import LATEST

CONVERT_DOC = """usage: deit convert SRC DST [--to=FORMAT] [--model=NAME] [--image_size=N|H,W] ...

Convert weights. SRC is the workdir of a run, a PyTorch checkpoint, .safetensors, .npz (big_vision,
vision_transformer) or Flax msgpack file, a Hugging Face or timm folder, an Orbax checkpoint or
hf-hub:ORG/NAME; its content tells which. The model is found in it by its names; where there are
several, SRC::KEY says which, as in dino.pth::student. DST is written as its name says, or as --to:

  timm         *.safetensors    one file with timm's names
  deit         *.pth, *.pt      one PyTorch file as facebookresearch/deit writes it
  huggingface  another name     a folder for transformers
  deit_jax     only with --to   a workdir for `deit eval`, `deit predict` and teacher.weights

Other people's models become teachers of any kind, which need nothing but JAX from then on. SRC is

  timm:NAME[@FILE]         a model of timm, with its published weights or those in FILE
  torch:MODULE:FUNCTION    a function that returns a torch module, or (module, dict of classes,
                           mean, std, image_size, channels, multi_label)
  python:MODULE:FUNCTION   a function that returns a deit_jax.Teacher
  FOLDER, with --to=teacher  one that transformers wrote, of any class of models for images

and DST a folder for config.teacher.weights. All but python: need the extra `torch`.

  deit convert runs/quickstart quickstart.safetensors
  deit convert hf-hub:facebook/deit-tiny-distilled-patch16-224 tiny.pth
  deit convert timm:regnety_160.deit_in1k teachers/regnety_160"""
TEACHER = "teacher"  # of --to: a teacher folder


def main(argv: list[str]) -> None:
    """Run `deit convert`."""
    command = Command("convert", CONVERT_DOC)
    command.string("model", None, "SRC's model, where SRC does not say it")
    command.choice("to", None, [*EXPORTERS, TEACHER], "format of DST")
    command.size(
        "image_size", "resize the position embedding for it, of timm: too: N, or HEIGHT,WIDTH"
    )
    command.integer(
        "num_classes", None, "with --head=drop: classes of DST; of timm: 0 = features alone"
    )
    policies = "; ".join(f"{k} = {v}" for k, v in HEAD_POLICIES.items())
    command.choice("head", "error", list(HEAD_POLICIES), policies)
    add_checkpoint_flags(command)
    command.boolean("force", False, "overwrite DST")
    words = command.parse(argv)
    if len(words) != 2:
        raise UsageError("give SRC and DST; see `deit convert --help`")
    values = command.flags
    from deit_jax.teachers.open import KINDS
    from deit_jax.weights.convert import convert
    from deit_jax.weights.load import load_variables

    if words[0].startswith(KINDS) or values.to == TEACHER:
        _make_teacher(words[0], to_path(words[1]), values)
        return
    shape = (values.model, values.num_classes, values.image_size, values.head)
    opened = load_variables(words[0], *shape, ema=values.ema, checkpoint=values.checkpoint)
    to = convert(opened, words[1], values.to, values.force)
    for note in opened.notes:
        print(note)
    what = f"{opened.name}, {len(opened.classes)} classes"
    print(f"{words[0]} ({opened.format}: {what}) -> {words[1]} ({to})")
    if call := EXPORTERS[to].call(opened, to_path(words[1])):
        print(f"in Python: {call}")


def _make_teacher(source: str, path: PurePath, values) -> None:
    """Write a teacher folder of somebody else's model, and say what it is."""
    from deit_jax.teachers.folder import check_free, write_teacher
    from deit_jax.teachers.open import PYTHON, convert_torch, open_python

    _check_flags(source, path, values)
    check_free(path, values.force)
    notes, difference = (), None
    if source.startswith(PYTHON):
        teacher = open_python(source)
        said = write_teacher(teacher, path, source=source, force=values.force, checked=True)
    else:
        made = convert_torch(source, values.num_classes, values.image_size, values.ema)
        teacher, notes, difference = made.in_float32, made.notes, made.difference
        said = write_teacher(
            teacher,
            path,
            source=source,
            crop_ratio=made.crop_ratio,
            interpolation=made.interpolation,
            force=values.force,
            versions=made.versions,
            checked=True,  # against what PyTorch says
        )
    for note in notes:
        print(note)
    if difference is not None:
        print(f"answers to two images of noise: as PyTorch's to {difference:.1g} of the largest")
    size = sum(size for _, size in backend(path).files(path))
    classes = f"{len(teacher.classes)} classes" if teacher.classes else "no classes"
    width = f"features of {said.features}" if said.features else "no features"
    print(f"{source} ({teacher.name}: {classes}, {width}) -> {path} (teacher, {size:,} bytes)")
    print(f"to teach: --config.teacher.weights={path}")


def _check_flags(source: str, path: PurePath, values) -> None:
    """Raise UserError for flags that are not a teacher's, and for sources that make none."""
    from deit_jax.teachers.open import KINDS, PYTHON

    if values.to not in (None, TEACHER):
        raise UserError(f"{source}: becomes a teacher folder alone; leave --to={values.to} out")
    endings = {suffix for exporter in EXPORTERS.values() for suffix in exporter.suffixes}
    if path.suffix in endings:
        raise UserError(f"{path}: a teacher is a folder; give it a name without {path.suffix}")
    asked = {
        "model": values.model is not None,
        "head": values.head != "error",
        "checkpoint": values.checkpoint != LATEST,
        "num_classes": values.num_classes is not None and source.startswith(PYTHON),
        "image_size": values.image_size is not None and source.startswith(PYTHON),
        "ema": values.ema and source.startswith(PYTHON),
    }
    for flag, given in asked.items():
        if given:
            raise UserError(f"--{flag} says nothing of the teacher in {source}; leave it out")
    if not source.startswith(KINDS) and not exists(to_path(source) / "config.json"):
        raise UserError(
            f"{source}: --to=teacher is for {', '.join(KINDS)} and folders of transformers; "
            "config.teacher.weights takes weights of our own models as they are"
        )
