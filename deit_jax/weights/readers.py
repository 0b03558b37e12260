"""Read weight files without the frameworks that wrote them, executing nothing that they contain.

A file is safetensors, PyTorch's zip format or older pickle stream, .npz or Flax's msgpack; a folder
Hugging Face's or Orbax's. Which one is decided by the content. places.py finds the model in it.
"""

import dataclasses
import functools
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from deit_jax.weights import jax_trees, pickles
from deit_jax.weights.places import Chosen, Refused, Wanted, choose

Flat = dict[str, np.ndarray]
ANY = Wanted()
IN_FOLDER = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
# First bytes of a map that is not empty: an empty one's is a pickle's.
_MSGPACK = tuple(bytes([n]) for n in (*range(0x81, 0x90), 0xDE, 0xDF))
# What a damaged or hostile file can make its reader raise.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True)
class Part:
    """The tensors of a model in a file, and what the file tells of it besides.

    `format` is what it is called, "" for one of PyTorch's or safetensors. `num_heads` are those of
    attention, where they are told; `googles` says that the names are big_vision's.
    """

    tensors: Flat
    notes: tuple[str, ...] = ()
    format: str = ""
    num_heads: int | None = None
    googles: bool = False


def read(path: str | Path) -> Flat:
    """Return the tensors of a model in a weight file or folder; see read_part."""
    return read_part(path).tensors


def read_part(path: str | Path, wanted: Wanted = ANY) -> Part:
    """Return the tensors of a model by the names that a file or folder gives them.

    What a checkpoint wraps them in, and what its names begin with, is taken off (places.py). Raise
    ValueError for anything that is not weights, or is damaged.
    """
    path = Path(path)
    orbax = jax_trees.checkpoint_in(path) if path.is_dir() and not _file_in(path) else None
    if path.is_dir() and not orbax:
        path = _file_in_folder(path)
    pick = functools.partial(choose, wanted=wanted)
    try:
        if orbax:
            return _jax_part(jax_trees.read_orbax(orbax.absolute()), pick, "Orbax checkpoint")
        return _read(path, path.stat().st_size, pick)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except (SafetensorError, *_DAMAGE) as error:
        raise ValueError(f"{path} is damaged: {error or type(error).__name__}") from error


def _read(path: Path, size: int, choose: pickles.Choose) -> Part:
    with path.open("rb") as file:
        head = file.read(16)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        chosen = choose(_read_safetensors(path))
        return Part(chosen.tensors, chosen.notes)
    if head.startswith(b"PK\x03\x04"):
        if _is_npz(path):
            return _jax_part(jax_trees.read_npz(path, size), choose, ".npz file")
        return _part(*pickles.read_zip(path, size, choose))
    if head.startswith(b"\x80"):
        return _part(*pickles.read_legacy(path, size, choose))
    if head[:1] in _MSGPACK:
        return _jax_part(jax_trees.read_msgpack(path), choose, "Flax msgpack file")
    raise Refused("no safetensors, PyTorch, .npz or Flax msgpack file")


def _part(tensors: Flat, chosen: Chosen) -> Part:
    return Part(tensors, chosen.notes)


def _jax_part(tree: Flat, choose: pickles.Choose, format_: str) -> Part:
    chosen = choose(jax_trees.to_torch(tree))
    jax_trees.check_is_known(chosen.tensors, chosen.recognised)
    googles = jax_trees.is_googles(chosen.tensors)
    return Part(chosen.tensors, chosen.notes, format_, jax_trees.heads_of(tree), googles)


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _file_in(folder: Path) -> Path | None:
    return next((folder / name for name in IN_FOLDER if (folder / name).is_file()), None)


def _file_in_folder(folder: Path) -> Path:
    if file := _file_in(folder):
        return file
    if (folder / "teacher.json").exists():
        raise ValueError(f"{folder} is a teacher folder: it is for config.teacher.weights alone")
    raise ValueError(
        f"{folder} holds neither {', '.join(IN_FOLDER)} nor an Orbax checkpoint, and is not the "
        "workdir of a `deit train` run"
    )


def _read_safetensors(path: Path) -> Flat:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
