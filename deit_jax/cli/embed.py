"""`deit embed`: features of images, in a file."""

from deit_jax.analysis.choices import FEATURES
from deit_jax.cli.flags import Command, UsageError, add_checkpoint_flags
from deit_jax.errors import UserError
from deit_jax.storage import on_disk
from deit_jax.weights.pretrained import PRETRAINED

EMBED_DOC = """usage: deit embed (--weights=W | --model=NAME) --out=FILE [--features=…] IMAGES ...

Write features of images: an array to FILE.npy, with the path of each row in FILE.paths.txt, or both
to FILE.parquet (columns path, embedding). W, NAME and IMAGES are those of `deit predict`; weights
without a head will do. Images that cannot be read have no row and are named; the exit code is then
1. The same command again takes up what was interrupted.

  deit embed --weights=runs/mine --out=photos.npy photos/
  deit embed --model=deit3_small_patch16_224 --features=patches --layer=8 --out=p.parquet photos/"""


def main(argv: list[str]) -> None:
    """Run `deit embed`."""
    command = Command("embed", EMBED_DOC)
    command.string("weights", "", "a run, file, folder or hf-hub: id")
    command.string("model", None, "name of the weights' model, or whose published ones to take")
    command.string("out", "", "the file to write: .npy or .parquet")
    kinds = "; ".join(f"{k} = {v}" for k, v in FEATURES.items())
    command.choice("features", "pooled", FEATURES, kinds)
    command.integer("layer", -1, "the block that they leave: 0, 1, … or from the end -1, -2, …")
    command.boolean("norm", True, "apply the model's last norm, also to earlier blocks")
    command.choice("dtype", "float32", ("float32", "float16"), "of the numbers written")
    add_checkpoint_flags(command)
    command.string("list", "", "file with paths of images, one a line; - is stdin")
    command.boolean("force", False, "overwrite FILE, and begin anew")
    words = command.parse(argv, required=("out",))
    values = command.flags
    if not values.weights and not values.model:
        raise UsageError("--weights=… is missing; see `deit embed --help`")
    if not words and not values.list:
        raise UsageError("no image given; see `deit embed --help`")
    from deit_jax.analysis.classify import unreadable_line
    from deit_jax.analysis.embed import embed
    from deit_jax.data.sources.named import named_images
    from deit_jax.weights.load import load_variables

    source = values.weights or PRETRAINED
    which = {"checkpoint": values.checkpoint, "ema": values.ema}
    # With a head or without, the features are the same.
    on_disk("--out", values.out)
    opened = load_variables(source, values.model, num_classes=0, **which)
    opened.check_convention()
    opened.tell()
    images = named_images(words, opened.reading.channels, values.list)
    choices = (values.features, values.layer, values.norm, values.dtype, values.force)
    missing = embed(opened, images, values.out, *choices, title="embed")
    print(f"{values.out}: {values.features} features of {len(images) - len(missing)} images")
    if missing:
        raise UserError(unreadable_line(missing, len(images)))
