"""`deit prepare`: images into a TFDS data set, without TensorFlow."""

import json
import sys
from pathlib import Path
from typing import Any

from deit_jax.cli.flags import Command, UsageError
from deit_jax.storage import local, on_disk

PREPARE_DOC = """usage: deit prepare SRC DST [--max-side=N] [--workers=N] [--name=NAME] [--json]
                    [--image-column=NAME] [--label-column=NAME]

Write the images below SRC as a TFDS data set to DST/NAME, for training and for plain TFDS. SRC is

  a folder of images     SRC/{train,val}/CLASS/… or SRC/CLASS/…, of which a part is held out
  the ILSVRC2012 tars    ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, with or without
                         the devkit; becomes imagenet2012
  parquet files          as Hugging Face has them; columns are found by their types, or named
  a save_to_disk folder  of Hugging Face's datasets; columns as above
  TFDS in tfrecord       NAME/VERSION or NAME/CONFIG/VERSION of what TFDS prepared

Files are stored byte for byte. --max-side=N changes pixels: larger images are scaled down and
encoded anew, which costs some accuracy and makes reading faster. The same command goes on after an
interruption; on a finished data set it checks every file against its checksum.

  deit prepare /data/ILSVRC2012 /data/tfds
  deit train --config=configs/deit.py --config.data.dir=/data/tfds --workdir=runs/deit"""


def main(argv: list[str]) -> None:
    """Run `deit prepare`."""
    command = Command("prepare", PREPARE_DOC)
    command.string("name", "", "the data set's name; from SRC if not given")
    command.integer("max_side", 0, "scale larger images down to N pixels; changes pixels", 0)
    command.integer("workers", 0, "processes; 0 = one a core", 0)
    command.number("eval_fraction", 0.2, "of a folder without val, held out")
    command.string("image_column", "", "of a table; by its type if not given")
    command.string("label_column", "", "of a table; by its type if not given")
    command.boolean("skip_unreadable", False, "leave broken images out and list them")
    command.boolean("json", False, "print one JSON object")
    words = command.parse(argv)
    if len(words) != 2:
        raise UsageError("give SRC and DST; see `deit prepare --help`")
    from deit_jax.data.prepare.build import prepare

    v = command.flags
    source, destination = local(words[0]), on_disk("DST", words[1])
    result = prepare(
        source,
        destination,
        v.name,
        v.max_side,
        v.workers,
        v.skip_unreadable,
        v.eval_fraction,
        columns=(v.image_column, v.label_column),
    )
    if v.json:
        json.dump(result, sys.stdout)
        print()
    else:
        print(report(result, destination))


def report(result: dict[str, Any], destination: Path) -> str:
    """Return what was written, in lines."""
    from deit_jax.data.prepare.build import CHECKSUMS

    counts = ", ".join(f"{n} {split}" for split, n in result["examples"].items())
    lines = [f"skipped, unreadable: {name}" for name in result["skipped"]]
    lines += [
        f"{result['path']}: {counts} images in {result['classes']} classes, "
        f"{result['bytes'] / 1e9:.3f} GB in {result['shards']} files "
        f"({result['shards_kept']} of them were there and are sound)",
        f"checksums: {Path(result['path']) / CHECKSUMS} (its own: {result['sha256'][:16]}…)",
        f"use it: --config.data.source=tfds:{result['name']} --config.data.dir={destination}",
    ]
    return "\n".join(lines)
