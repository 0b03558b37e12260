"""Write weights in another format."""

import dataclasses
import logging
from pathlib import PurePath

from deit_jax.data.decode import PLAIN
from deit_jax.errors import UserError
from deit_jax.storage import backend, exists, to_path
from deit_jax.weights.exporters import EXPORTERS
from deit_jax.weights.fit import LoadedWeights

log = logging.getLogger("deit_jax")

# How images are read by whoever knows nothing else; `fill` matters to resize=pad alone.
_PLAIN = {key: getattr(PLAIN, key) for key in ("resize", "exif", "bits")}


def format_of(path: PurePath, to: str | None) -> str:
    """Return the format that a name or `to` asks for; raise UserError where they contradict."""
    by_suffix = {suffix: name for name, e in EXPORTERS.items() for suffix in e.suffixes}
    asked, to = to, to or by_suffix.get(path.suffix, "huggingface")
    if to == "huggingface" and path.suffix[1:].isalpha() and not asked:
        known = ", ".join(by_suffix)
        raise UserError(
            f"{path}: files end in {known}; --to=huggingface makes a folder of any name"
        )
    endings = EXPORTERS[to].suffixes
    if endings and path.suffix not in endings:
        raise UserError(f"{path}: --to={to} makes one file; name it {path.name}{endings[0]}")
    return to


def convert(
    opened: LoadedWeights, destination: str | PurePath, to: str | None = None, force: bool = False
) -> str:
    """Write opened weights and return the format; raise UserError where something is in the way.

    Other formats than ours have no words for the way in which a run read its images: a warning.
    """
    path = to_path(destination)
    to = format_of(path, to)
    # A checkpoint is never replaced: a workdir may hold a run that took days.
    if exists(path) and (not force or to == "deit_jax" or exists(path / "checkpoints")):
        remedy = "choose another name" if force else "--force overwrites a file or a folder"
        raise UserError(f"{path} exists; {remedy}")
    try:
        backend(path).make_folder(path.parent)
        EXPORTERS[to].write(opened, path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    unsaid = _unsaid(opened, to)
    if opened.multi_label and to == "deit":
        log.warning("%s cannot say that its classes are answered each by itself (sigmoid)", path)
    if said := ", ".join(unsaid):
        log.warning("%s cannot tell other programs %s: prepare its images so", path, said)
    return to


def _unsaid(opened: LoadedWeights, to: str) -> list[str]:
    """Return how a run reads its images, where a format cannot tell other programs."""
    if to == "deit_jax":
        return []
    reading, says = dataclasses.asdict(opened.reading), EXPORTERS[to].says
    oblong = isinstance(opened.image_size, tuple) and "oblong" not in says
    unsaid = [f"model.image_size={opened.image_size} just covered"] if oblong else []
    for key, plain in _PLAIN.items():
        if reading[key] != plain and not {key, f"{key}={reading[key]}"} & {*says}:
            unsaid.append(f"data.{key}={reading[key]}")
    return unsaid
