"""Read weight files without PyTorch, executing nothing that they contain.

A file is safetensors, PyTorch's zip format or PyTorch's older pickle stream, or a Hugging Face
folder; which one is decided by its content.
"""

import dataclasses
import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
Flat = dict[str, np.ndarray]
# What a damaged or hostile pickle can make the unpickler or zipfile raise.
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


class _Refused(Exception):
    """The pickle asks for something that weights do not need."""


def read(path: str | Path) -> Flat:
    """Return the tensors of a weight file or Hugging Face folder by the names that it gives them.

    A checkpoint's `model` or `state_dict` entry is unwrapped. Raise ValueError for anything that is
    not weights, is damaged, or is a pickle that refers to code.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in_folder(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
    try:
        if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
            return _read_safetensors(path)
        if head.startswith(b"PK\x03\x04"):
            return _read_zip(path, size)
        if head.startswith(b"\x80"):
            return _read_legacy(path, size)
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except (SafetensorError, *_DAMAGE) as error:
        raise ValueError(f"{path} is damaged: {error or type(error).__name__}") from error
    raise ValueError(f"{path} is neither a safetensors nor a PyTorch file")


def _file_in_folder(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _read_safetensors(path: Path) -> Flat:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_zip(path: Path, size: int) -> Flat:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # PyTorch stores without compression, so that an honest file cannot outgrow itself.
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise _Refused("the entries of the zip file are larger than the file")
        # What a compressed entry claims to hold does not limit what unpacking it takes.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise _Refused("a PyTorch file is not compressed; unpack it and save it again")
        root = next((n.removesuffix("data.pkl") for n in entries if n.endswith("/data.pkl")), None)
        if root is None:
            raise _Refused("a zip file without data.pkl is not a PyTorch file")
        byteorder = f"{root}byteorder"
        if byteorder in entries and archive.read(byteorder) != b"little":
            raise _Refused("big-endian files are not supported")
        unpickler = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")))
        tensors = _tensors(unpickler.load())
        used = {tensor.storage for tensor in tensors.values()}
        data = {storage: archive.read(f"{root}data/{storage.key}") for storage in used}
    return {name: tensor.view(data[tensor.storage]) for name, tensor in tensors.items()}


def _read_legacy(path: Path, size: int) -> Flat:
    # Four pickles (magic, protocol, platform, the tree), the storages' keys, then their data.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        magic = _Unpickler(stream).load()
        if magic != _LEGACY_MAGIC or _Unpickler(stream).load() != _LEGACY_PROTOCOL:
            raise _Refused("a pickle that is not a PyTorch file")
        if not _Unpickler(stream).load()["little_endian"]:
            raise _Refused("big-endian files are not supported")
        unpickler = _Unpickler(stream)
        tensors = _tensors(unpickler.load())
        used = {tensor.storage for tensor in tensors.values()}
        data = {}
        for key in map(_plain, _Unpickler(stream).load()):
            storage = unpickler.storages[key]
            (count,) = struct.unpack("<q", stream.read(8))
            if count != storage.count or storage.bytes > size - stream.tell():
                raise _Refused(f"storage {key} of {count} elements does not fit into the file")
            if storage in used:
                data[storage] = stream.read(storage.bytes)
            else:
                stream.seek(storage.bytes, io.SEEK_CUR)
    return {name: tensor.view(data[tensor.storage]) for name, tensor in tensors.items()}


def _tensors(tree: Any) -> dict[str, "_Tensor"]:
    """Return the named tensors of a checkpoint's tree."""
    for key in ("model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    found = tree.items() if isinstance(tree, dict) else ()
    tensors = {name: value for name, value in found if isinstance(value, _Tensor)}
    if not tensors:
        keys = f" among {', '.join(map(str, tree))[:200]}" if isinstance(tree, dict) else ""
        raise _Refused(f"no weights found{keys}")
    return tensors


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A run of numbers that tensors are views of, not yet read."""

    key: str
    dtype: np.dtype
    count: int

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, data: bytes) -> np.ndarray:
        """Return the tensor as a read-only view of its storage's data."""
        if len(data) != self.storage.bytes:
            raise _Refused(f"storage {self.storage.key} has {len(data)} bytes")
        count = math.prod(self.shape)
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((extent - 1) * stride for extent, stride in steps)
        inside = min((self.offset, *self.shape, *self.strides)) >= 0
        if not inside or count > self.storage.count or (count and last >= self.storage.count):
            raise _Refused(f"a tensor of shape {self.shape} reaches beyond its storage")
        if not count:
            return np.zeros(self.shape, self.storage.dtype)
        item = self.storage.dtype.itemsize
        flat = np.frombuffer(data, self.storage.dtype)[self.offset :]
        return np.lib.stride_tricks.as_strided(
            flat, self.shape, [stride * item for stride in self.strides], writeable=False
        )


def _rebuild_tensor(storage, offset, shape, strides, *_unused) -> _Tensor:
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    small = all(isinstance(n, int) and abs(n) < 1 << 63 for n in numbers)
    if not isinstance(storage, _Storage) or not small or len(shape) != len(strides):
        raise _Refused("a tensor whose shape is no shape")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor, *_unused) -> _Tensor:
    return tensor


def _plain(key: Any) -> Any:
    """Return a key of a dict if it is a string, a number or the like.

    Tuples of tuples of themselves are short in a pickle and take for ever to hash or to print.
    """
    if not isinstance(key, str | bytes | int | float | bool | None):
        raise _Refused(f"a {type(key).__name__} as a name, which weights do not need")
    return key


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    """Return an OrderedDict's content: Python 2 pickled its pairs as an argument."""
    return {_plain(key): value for key, value in pairs}


class _Inert:
    """Stand for an object that weights do not need, such as the arguments of the run."""


_GLOBALS = {
    ("collections", "OrderedDict"): _dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("argparse", "Namespace"): _Inert,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


# Python's own unpickler, not C's: that one sizes its buffers by what the file claims.
class _Unpickler(pickle._Unpickler):
    """Build a tree of dicts, lists, scalars and unread tensors; call nothing else."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream):
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise _Refused(f"refused to load {module}.{name}, which weights do not need")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, count, *_view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(_view):
            raise _Refused(f"refused to load what is no storage, but {_plain(kind)!s:.40}")
        storage = _Storage(str(_plain(key)), dtype, int(_plain(count)))
        if storage.count < 0 or self.storages.setdefault(storage.key, storage) != storage:
            raise _Refused(f"storage {key} is described twice, differently")
        return storage

    def load_build(self):
        """Drop the attributes of an object: none that is let in needs them."""
        self.stack.pop()

    def load_setitem(self):
        """Set one item of a dict, and of nothing else."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def load_setitems(self):
        """Set items of a dict, and of nothing else."""
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def load_dict(self):
        """Make a dict of the items on the stack."""
        items, made = self.pop_mark(), {}
        self._set(made, items)
        self.append(made)

    @staticmethod
    def _set(target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise _Refused(f"items of a {type(target).__name__}, which weights do not need")
        target.update(zip(map(_plain, items[::2]), items[1::2], strict=True))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    for _opcode in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):  # they hash what they get
        del dispatch[_opcode[0]]
    del dispatch[pickle.BYTEARRAY8[0]]  # it too allocates what the file claims
