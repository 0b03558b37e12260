"""Read weight files without the frameworks that wrote them, executing nothing that they contain.

A file is safetensors, PyTorch's zip format or PyTorch's older pickle stream, or a Hugging Face
folder; which one is decided by its content. places.py finds the model in it.
"""

import functools
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from deit_jax.weights import pickles
from deit_jax.weights.places import Chosen, Refused, Wanted, choose

Flat = dict[str, np.ndarray]
ANY = Wanted()
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


def read(path: str | Path) -> Flat:
    """Return the tensors of a model in a weight file or folder; see read_part."""
    return read_part(path)[0]


def read_part(path: str | Path, wanted: Wanted = ANY) -> tuple[Flat, tuple[str, ...]]:
    """Return the tensors of a model by the names that a file or folder gives them, and notes.

    What a checkpoint wraps them in, and what its names begin with, is taken off (places.py). Raise
    ValueError for anything that is not weights, or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in_folder(path)
    size = path.stat().st_size
    try:
        tensors, chosen = _read(path, size, functools.partial(choose, wanted=wanted))
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except (SafetensorError, *_DAMAGE) as error:
        raise ValueError(f"{path} is damaged: {error or type(error).__name__}") from error
    return tensors, chosen.notes


def _read(path: Path, size: int, choose: pickles.Choose) -> tuple[Flat, Chosen]:
    with path.open("rb") as file:
        head = file.read(16)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _whole(choose(_read_safetensors(path)))
    if head.startswith(b"PK\x03\x04"):
        return pickles.read_zip(path, size, choose)
    if head.startswith(b"\x80"):
        return pickles.read_legacy(path, size, choose)
    raise Refused("neither a safetensors nor a PyTorch file")


def _whole(chosen: Chosen) -> tuple[Flat, Chosen]:
    return chosen.tensors, chosen


def _file_in_folder(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _read_safetensors(path: Path) -> Flat:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
