"""A teacher folder: any teacher, written so that nobody needs what it was made with.

It holds teacher.json, weights.safetensors in float32 under flat names, and for each compute dtype
one program of jax.export, of any batch and for every platform: what to call with the weights.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

import deit_jax
from deit_jax.errors import UserError
from deit_jax.shapes import Size, simplest
from deit_jax.storage import backend, exists, local, replace_folder, to_path, write_json
from deit_jax.teachers.programs import DTYPES, Programs, check_says, programs_of
from deit_jax.teachers.teacher import Teacher

log = logging.getLogger("deit_jax")

FORMAT = 1
DESCRIPTION, WEIGHTS, OWN = "teacher.json", "weights.safetensors", "sha256_of_this"
AGAIN = "write the folder again with `deit convert`, or restore it from a copy"
_CONVENTIONS = ("name", "classes", "also_called", "mean", "std", "channels", "multi_label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What teacher.json says of a teacher besides its conventions.

    `source` is what it was made of, `features` their width, None without any; `macs` and
    `image_bytes` are those of Teacher. `crop_ratio` and
    `interpolation` are how its images were made, None where nobody said it.
    """

    source: str = ""
    crop_ratio: float | None = None
    interpolation: str | None = None
    features: int | None = None
    macs: int | None = None
    image_bytes: int | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def program_file(dtype: str) -> str:
    """Return the name of the program that computes in a dtype."""
    return f"program_{dtype}.bin"


def is_folder(path: str | PurePath) -> bool:
    """Return whether a path is a teacher folder, whole or not."""
    return any(exists(to_path(path) / name) for name in (DESCRIPTION, *map(program_file, DTYPES)))


def write_teacher(
    teacher: Teacher,
    path: str | PurePath,
    *,
    source: str = "",
    crop_ratio: float | None = None,
    interpolation: str | None = None,
    force: bool = False,
    versions: dict[str, str] | None = None,
    checked: bool = False,
) -> Description:
    """Write a teacher folder, whole or not at all; return what it says besides the conventions.

    `force` replaces a teacher folder that is there; `checked` is for who knows that its answers are
    in order. Raise UserError where `apply` does not keep the
    contract of Teacher, or something is in the way.
    """
    path = to_path(path)
    check_free(path, force)
    made = programs_of(teacher)
    if not checked:
        for note in check_says(teacher):
            log.warning("%s: %s", teacher.name, note)
    known = {"jax": jax.__version__, "deit_jax": deit_jax.__version__, **(versions or {})}
    described = Description(
        source=source or teacher.name,
        crop_ratio=crop_ratio,
        interpolation=interpolation,
        features=made.feature_width,
        macs=made.macs,
        image_bytes=made.image_bytes,
        versions=known,
    )
    contents = {program_file(dtype): blob for dtype, blob in made.blobs.items()}
    contents[WEIGHTS] = save_tensors(made.weights)
    if not teacher.classes and made.num_classes:
        names = tuple(f"class {i}" for i in range(made.num_classes))
        teacher = dataclasses.replace(teacher, classes=names)
    whole = json.loads(json.dumps(_described(teacher, described, contents), default=str))
    whole[OWN] = _checksum(whole)
    if wrong := _wrong(whole):
        raise UserError(f"{teacher.name}: {wrong}")
    try:
        _write(path, contents, whole)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return described


def _checksum(described: dict[str, Any]) -> str:
    """Return the checksum of what teacher.json says, but for the checksum itself."""
    said = {key: value for key, value in described.items() if key != OWN}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def check_free(path: PurePath, force: bool) -> None:
    """Raise UserError where a folder cannot be written, because of what is there."""
    if not exists(path):
        return
    if not force:
        raise UserError(f"{path} exists; choose another name, or --force to write a teacher anew")
    if not is_folder(path):
        raise UserError(f"{path} is no teacher folder, and is not overwritten; choose another name")


def _described(teacher: Teacher, said: Description, contents: dict[str, bytes]) -> dict[str, Any]:
    size = teacher.image_size
    return {
        "format": FORMAT,
        **{key: getattr(teacher, key) for key in _CONVENTIONS},
        "classes": list(teacher.classes),
        "also_called": list(teacher.also_called),
        "image_size": list(size) if isinstance(size, tuple) else size,
        **dataclasses.asdict(said),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }


def _write(path: PurePath, contents: dict[str, bytes], described: dict[str, Any]) -> None:
    """Write the files beside the folder, which then takes its name at once."""
    disk = backend(path)
    new, old = (path.with_name(f"{path.name}.{end}") for end in ("new.tmp", "old.tmp"))
    for leftover in (new, old):
        disk.remove(leftover)
    try:
        disk.make_folder(new)
        for name, data in contents.items():
            disk.write(new / name, data)
        write_json(new / DESCRIPTION, described)
        replace_folder(new, path, old)
    finally:
        disk.remove(new)


def read_description(path: str | PurePath) -> dict[str, Any]:
    """Return what teacher.json says; raise UserError if that is no teacher of this format."""
    file = to_path(path) / DESCRIPTION
    if not exists(file):
        raise UserError(f"{path}: no teacher folder, it holds no {DESCRIPTION}; `deit convert`")
    try:
        said = json.loads(backend(file).read(file))
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {AGAIN}") from error
    if not isinstance(said, dict) or "format" not in said:
        raise UserError(f"{file}: does not say its format; it is none of a teacher folder's")
    if said["format"] != FORMAT:
        raise UserError(
            f"{file}: format {said['format']!r}, and this version reads format {FORMAT}; install "
            "the version of deit_jax that wrote it, or convert the teacher anew"
        )
    if wrong := _wrong(said):
        raise UserError(f"{file}: {wrong}; {AGAIN}")
    return said


def _wrong(said: dict[str, Any]) -> str:
    """Return what of a description is not as it must be, "" where nothing is."""
    if said.get(OWN) != _checksum(said):
        return "is not as it was written"
    for key, is_valid in _VALID.items():
        if key not in said or not is_valid(said[key]):
            return f"{key}={said.get(key)!r:.60} is not what it must be"
    if {len(said["mean"]), len(said["std"])} != {said["channels"]}:
        return f"mean and std are not of {said['channels']} channels"
    if len(said["also_called"]) not in (0, len(said["classes"])):
        return "also_called has not a name for each class"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_size(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))
    return value is None or _is_count(value) or pair


_VALID: dict[str, Callable[[Any], bool]] = {
    "name": _is_text,
    "source": _is_text,
    "classes": _is_list(_is_text),
    "also_called": _is_list(_is_text),
    "mean": _is_list(_is_number),
    "std": _is_list(lambda value: _is_number(value) and value > 0),
    "channels": _is_count,
    "image_size": _is_size,
    "crop_ratio": lambda value: value is None or (_is_number(value) and value > 0),
    "interpolation": lambda value: value is None or _is_text(value),
    "features": lambda value: value is None or _is_count(value),
    "macs": lambda value: value is None or (isinstance(value, int) and value >= 0),
    "image_bytes": lambda value: value is None or (isinstance(value, int) and value >= 0),
    "multi_label": lambda value: value is None or isinstance(value, bool),
    "versions": lambda value: isinstance(value, dict),
    "sha256": lambda value: isinstance(value, dict),
}


def open_folder(path: str | PurePath, dtype: str, abstract: bool = False) -> Teacher:
    """Return the teacher in a folder, its weights in `dtype`; nothing but JAX is needed.

    With `abstract` its params are shapes, and the file of weights may be anything that begins with
    the right header. Raise UserError, a line, for what is missing, damaged or too new.
    """
    path = local(path)
    said = read_description(path)
    assert dtype in DTYPES, dtype
    file = path / program_file(dtype)
    made = Programs.read(_checked(file, said), file, said["versions"].get("jax", "?"))
    params = _shapes(path, dtype) if abstract else _weights(path, said, dtype)
    made.check_takes(params, path)
    size: Size | list[int] | None = said["image_size"]
    return Teacher(
        apply=made.apply,
        params=params,
        mean=tuple(map(float, said["mean"])),
        std=tuple(map(float, said["std"])),
        classes=tuple(said["classes"]),
        also_called=tuple(said["also_called"]),
        image_size=simplest((size[0], size[1])) if isinstance(size, list) else size,
        channels=said["channels"],
        multi_label=said["multi_label"],
        name=said["name"],
        macs=said["macs"],
        image_bytes=said["image_bytes"],
        program=said["sha256"][file.name],
    )


def _checked(file: PurePath, said: dict[str, Any]) -> bytes:
    """Return a file's content, which teacher.json has the checksum of."""
    try:
        data = backend(file).read(file)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{file}: cannot be read ({reason}); {AGAIN}") from error
    if hashlib.sha256(data).hexdigest() != said["sha256"].get(file.name):
        raise UserError(f"{file} is damaged: not what {DESCRIPTION} has the checksum of; {AGAIN}")
    return data


def _weights(path: PurePath, said: dict[str, Any], dtype: str) -> dict[str, np.ndarray]:
    file = path / WEIGHTS
    try:
        tensors = load_tensors(_checked(file, said))
    except SafetensorError as error:
        raise UserError(f"{file}: no safetensors file ({error}); {AGAIN}") from error
    return {name: as_computed(x, dtype) for name, x in tensors.items()}


def as_computed(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return floats in the dtype of computing, other numbers as they are."""
    return x.astype(jnp.dtype(dtype)) if x.dtype.kind == "f" else x


_SAFE_DTYPES = {"F32": "float32", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"} | {
    "U32": "uint32",
    "U16": "uint16",
    "BOOL": "bool",
}


def _shapes(path: PurePath, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the weights' shapes by the header of their file, whose numbers are not read."""
    file = path / WEIGHTS
    try:
        disk = backend(file)
        size = int.from_bytes(disk.read_start(file, 8), "little")
        header = json.loads(disk.read_start(file, 8 + size)[8:])
        header.pop("__metadata__", None)
        kinds = {name: _SAFE_DTYPES[x["dtype"]] for name, x in header.items()}
        return {
            name: jax.ShapeDtypeStruct(
                tuple(x["shape"]), jnp.dtype(dtype if kinds[name] == "float32" else kinds[name])
            )
            for name, x in header.items()
        }
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{file}: cannot be read ({reason}); {AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise UserError(f"{file}: no safetensors file; {AGAIN}") from error
