"""`deit share`: a model to the Hugging Face hub."""

import json
import logging
import sys
import tempfile
from pathlib import Path

from deit_jax.cli.flags import Command, UsageError, add_checkpoint_flags
from deit_jax.errors import UserError
from deit_jax.share.upload import check_name, open_hub, upload
from deit_jax.storage import backend, exists, on_disk

log = logging.getLogger("deit_jax")

SHARE_DOC = """usage: deit share SRC ORG/NAME [--onnx] [--private] [--dry-run] ...

Publish a model on the Hugging Face hub, in a repository that timm, transformers and deit_jax load
by its name. SRC is whatever `deit predict` takes; the workdir of a run gives most. The repository
gets

  model.safetensors, config.json  weights with timm's names, class names, crop, mean and std
  README.md                       a model card: accuracy by head, recipe, data, teacher, how to
                                  load it, what was not evaluated
  train_config.json, results.json of a run
  report.html                     of a run; it shows images of the evaluation data
  model.onnx                      with --onnx: whole images in, resizing and cropping in the file

--dry-run writes these into a folder, sends nothing, and needs no account. Paths of this machine
are left out of all of them. Else the client of the hub must know you: `hf auth login`.

  deit share runs/quickstart ORG/NAME --dry-run
  deit share runs/quickstart ORG/NAME --onnx --license=apache-2.0"""


def main(argv: list[str]) -> None:
    """Run `deit share`."""
    command = Command("share", SHARE_DOC)
    command.string("model", None, "SRC's model, where SRC does not say it")
    command.boolean("dry_run", False, "write the folder and send nothing")
    command.string("folder", "", "where --dry-run writes; NAME if not given")
    command.boolean("onnx", False, "add model.onnx (needs the extra `onnx`, and jax2onnx)")
    command.boolean("report", True, "add report.html of a run")
    command.boolean("private", False, "make a new repository private")
    command.string("license", "", "of the weights, by the hub's names: apache-2.0, cc-by-4.0, …")
    command.string("message", "Add model", "of the commit")
    add_checkpoint_flags(command)
    command.boolean("json", False, "print what was written as JSON")
    words = command.parse(argv)
    if len(words) != 2:
        raise UsageError("give SRC and ORG/NAME; see `deit share --help`")
    source, repository = words
    values = command.flags
    check_name(repository)
    if values.folder and not values.dry_run:
        raise UsageError("--folder says where --dry-run writes; give both, or neither")
    from deit_jax.share.folder import Wanted, write_folder

    if values.onnx:
        from deit_jax.export.write import check_packages

        check_packages("onnx")
    wanted = Wanted(
        repository=repository,
        onnx=values.onnx,
        report=values.report,
        licence=values.license,
        checkpoint=values.checkpoint,
        ema=values.ema,
        model=values.model,
    )
    if not values.license:
        log.warning("no licence named; without --license=… nobody may use the weights")
    if values.dry_run:
        folder = on_disk("--folder", values.folder or repository.partition("/")[2])
        if exists(folder) and backend(folder).names(folder):
            raise UserError(f"{folder}: is not empty; choose another --folder")
        _tell(values.json, str(folder), write_folder(source, folder, wanted))
        return
    api = open_hub()  # before minutes of work
    with tempfile.TemporaryDirectory(prefix="deit-share-") as name:
        names = write_folder(source, Path(name), wanted)
        place = upload(api, Path(name), repository, values.private, values.message)
    _tell(values.json, place, names)


def _tell(as_json: bool, place: str, names: list[str]) -> None:
    if as_json:
        json.dump({"out": place, "files": names}, sys.stdout)
        print()
    else:
        print(f"{place}: {', '.join(names)}")
