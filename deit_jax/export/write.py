"""Write a model as a program of another runtime, verified, whole or not at all."""

import contextlib
import dataclasses
import importlib
import importlib.util
import tempfile
from pathlib import Path, PurePath
from typing import Any

from deit_jax.errors import UserError
from deit_jax.export.choices import FORMATS, Options
from deit_jax.export.program import program_of
from deit_jax.export.verify import Verified, verify
from deit_jax.storage import backend, exists, read_json, replace_folder, to_path, write_json
from deit_jax.weights.fit import LoadedWeights

METADATA = "metadata.json"
OF_FOLDERS = ("program.bin", "saved_model.pb")  # one of them is in a folder that was exported


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: its size, what is known of it, and how far it is from the model."""

    format: str
    bytes: int
    described: dict[str, Any]
    made_with: dict[str, str]
    verified: Verified | None


def format_of(destination: PurePath, to: str | None) -> str:
    """Return the format that a name or `to` asks for; raise UserError where they contradict."""
    by_suffix = {f.suffix: name for name, f in FORMATS.items() if f.suffix}
    suffix = destination.suffix.lower()
    if to is None and suffix not in by_suffix:
        raise UserError(f"{destination}: its name does not say what it shall be; give --to=…")
    to = to or by_suffix[suffix]
    if FORMATS[to].suffix and suffix != FORMATS[to].suffix:
        raise UserError(f"{destination}: --to={to} makes a file; name it …{FORMATS[to].suffix}")
    if not FORMATS[to].suffix and suffix in by_suffix:
        raise UserError(f"{destination}: --to={to} makes a folder; give it another name")
    return to


def check_packages(to: str) -> None:
    """Raise UserError with what to install where a format needs a package that is not there."""
    missing = [p for p in FORMATS[to].packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"--to={to} needs {', '.join(missing)}: {FORMATS[to].remedy}")


def export(
    opened: LoadedWeights,
    destination: str | PurePath,
    to: str | None = None,
    options: Options | None = None,
    check: bool = True,
    force: bool = False,
) -> Exported:
    """Write a model as a program of another runtime, and return what was written.

    With `check` it is run again by that runtime before it takes its place, and refused with a
    UserError if its answers are not the model's.
    """
    path = to_path(destination)
    to = format_of(path, to)
    check_packages(to)
    for there in _places(path, to):
        if exists(there) and not (force and _is_export(there, to)):
            raise UserError(_in_the_way(there, force))
    program = program_of(opened, options or Options())
    module = importlib.import_module(FORMATS[to].module)
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / path.name
        made_with = module.write(program, made)
        verified = verify(program, module.open_program(made)) if check else None
        whole = dict(program.described, made_with=made_with)
        if verified:
            whole["verified"] = dataclasses.asdict(verified)
        try:
            size = _put(made, path, whole)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return Exported(to, size, whole, made_with, verified)


def _places(path: PurePath, to: str) -> list[PurePath]:
    """Return what an export may write: large weights of a file lie beside it."""
    return [path, *([path.with_name(f"{path.name}.data")] if FORMATS[to].suffix else [])]


def _is_export(path: PurePath, to: str) -> bool:
    """Return whether what is at a path was written by `deit export`, so that it may be replaced."""
    disk = backend(path)
    if FORMATS[to].suffix:
        return not disk.is_folder(path)
    if not exists(path / METADATA) or not set(OF_FOLDERS) & set(disk.names(path)):
        return False
    with contextlib.suppress(UserError, OSError):
        return str(read_json(path / METADATA).get("written_by")).startswith("deit_jax ")
    return False


def _in_the_way(path: PurePath, force: bool) -> str:
    if force:
        return f"{path}: is there and is no program that was exported; choose another name"
    return f"{path} exists; choose another name, or --force to write it anew"


def _put(made: Path, path: PurePath, described: dict[str, Any]) -> int:
    """Move what was made to its place, a folder at once; return its bytes."""
    disk = backend(path)
    disk.make_folder(path.parent)
    if made.is_dir():
        return _put_folder(made, path, described)
    files = sorted(made.parent.iterdir(), reverse=True)  # the file itself after its weights
    for file in files:
        disk.write(path.with_name(file.name), file.read_bytes())
    if len(files) == 1:
        disk.remove(path.with_name(f"{path.name}.data"))  # of the file that was there
    return sum(file.stat().st_size for file in files)


def _put_folder(made: Path, path: PurePath, described: dict[str, Any]) -> int:
    """Write a folder beside its place, which it then takes at once."""
    disk, files = backend(path), sorted(f for f in made.rglob("*") if f.is_file())
    new, old = (path.with_name(f"{path.name}.{end}") for end in ("new.tmp", "old.tmp"))
    for leftover in (new, old):
        disk.remove(leftover)
    try:
        for file in files:
            target = new / file.relative_to(made)
            disk.make_folder(target.parent)
            disk.write(target, file.read_bytes())
        write_json(new / METADATA, described)
        replace_folder(new, path, old)
    finally:
        disk.remove(new)
    return sum(file.stat().st_size for file in files)
