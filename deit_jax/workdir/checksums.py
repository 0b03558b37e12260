"""Checksums of a directory's files, kept in it: a flipped bit in an array goes unnoticed else."""

import json
from pathlib import Path, PurePath

from deit_jax.storage import backend, exists, is_remote, to_path, write_json

NAME = "sha256.json"
TIMES = "_CHECKPOINT_METADATA"  # Orbax adds the time to it last of all: it must only be JSON


def write(directory: PurePath) -> None:
    """Record the checksum of every file below `directory`."""
    disk = backend(directory)
    names = [name for name, _ in disk.files(directory) if name not in (NAME, TIMES)]
    sums = {name: disk.sha256(directory / name) for name in names}
    write_json(directory / NAME, sums, indent=1)


def has(directory: PurePath) -> bool:
    """Return whether checksums were recorded."""
    return exists(directory / NAME)


def problem(directory: PurePath) -> str | None:
    """Return what is wrong with the files that `write` recorded, None if nothing is.

    Nothing is known to be wrong where nothing was recorded.
    """
    disk = backend(directory)
    if not has(directory):
        return None
    try:
        sums = json.loads(disk.read(directory / NAME))
        json.loads(disk.read(directory / TIMES))
        for name, recorded in sums.items():
            if disk.sha256(directory / name) != recorded:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{to_path(error.filename).relative_to(directory)} is missing"
    except (ValueError, AttributeError):
        return f"{NAME} or {TIMES} is not valid JSON"
    except OSError as error:
        if is_remote(directory):  # a line that is down says nothing of what is behind it
            raise
        return f"{Path(error.filename).relative_to(directory)}: {error.strerror}"
    return None
