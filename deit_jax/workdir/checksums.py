"""Checksums of a directory's files, kept in it: a flipped bit in an array goes unnoticed else."""

import hashlib
import json
from pathlib import Path

NAME = "sha256.json"
TIMES = "_CHECKPOINT_METADATA"  # Orbax adds the time to it last of all: it must only be JSON


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(directory: Path) -> None:
    """Record the checksum of every file below `directory`."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in (NAME, TIMES))
    sums = {p.relative_to(directory).as_posix(): _digest(p) for p in files}
    temporary = directory / f"{NAME}.tmp"
    temporary.write_text(json.dumps(sums, indent=1) + "\n")
    temporary.replace(directory / NAME)


def has(directory: Path) -> bool:
    """Return whether checksums were recorded."""
    return (directory / NAME).exists()


def problem(directory: Path) -> str | None:
    """Return what is wrong with the files that `write` recorded, None if nothing is.

    Nothing is known to be wrong where nothing was recorded.
    """
    path = directory / NAME
    if not has(directory):
        return None
    try:
        sums = json.loads(path.read_text())
        json.loads((directory / TIMES).read_text())
        for name, recorded in sums.items():
            if _digest(directory / name) != recorded:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(directory)} is missing"
    except (ValueError, AttributeError):
        return f"{NAME} or {TIMES} is not valid JSON"
    except OSError as error:
        return f"{Path(error.filename).relative_to(directory)}: {error.strerror}"
    return None
