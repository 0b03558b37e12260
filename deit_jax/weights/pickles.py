"""Read PyTorch's files without PyTorch, executing and importing nothing that they name.

Tensors and NumPy's arrays of numbers are read; every other object becomes an inert stand-in.
"""

import dataclasses
import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from deit_jax.weights import pickled_arrays
from deit_jax.weights.pickled_arrays import Array, Dtype, Latin1
from deit_jax.weights.places import Chosen, Refused

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
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
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
Flat = dict[str, np.ndarray]
Choose = Callable[[Any], Chosen]


def read_zip(path: Path, size: int, choose: Choose) -> tuple[Flat, Chosen]:
    """Return the chosen tensors of a file in PyTorch's zip format."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        check_entries(archive, size)
        root = next((n.removesuffix("data.pkl") for n in entries if n.endswith("/data.pkl")), None)
        if root is None:
            raise Refused("a zip file without data.pkl is not a PyTorch file")
        byteorder = f"{root}byteorder"
        if byteorder in entries and archive.read(byteorder) != b"little":
            raise Refused("big-endian files are not supported")
        unpickler = Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")))
        chosen = _chosen(unpickler, choose)
        used = {tensor.storage for tensor in chosen.tensors.values() if tensor.storage}
        data = {storage: archive.read(f"{root}data/{storage.key}") for storage in used}
    return _viewed(chosen, data), chosen


def check_entries(archive: zipfile.ZipFile, size: int) -> None:
    """Raise Refused for an archive that may be larger than its file: none of ours is packed."""
    # PyTorch stores without compression, so that an honest file cannot outgrow itself.
    if sum(entry.file_size for entry in archive.infolist()) > size:
        raise Refused("the entries of the zip file are larger than the file")
    # What a compressed entry claims to hold does not limit what unpacking it takes.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise Refused("a weight file is not compressed; unpack it and save it again")


def read_legacy(path: Path, size: int, choose: Choose) -> tuple[Flat, Chosen]:
    """Return the chosen tensors of a file in PyTorch's older format."""
    # Four pickles (magic, protocol, platform, the tree), the storages' keys, then their data.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        magic = Unpickler(stream).load()
        if isinstance(magic, dict):  # of NumPy's arrays, without PyTorch
            chosen = choose(magic)
            return _viewed(chosen, {}), chosen
        if magic != LEGACY_MAGIC or Unpickler(stream).load() != LEGACY_PROTOCOL:
            raise Refused("a pickle that is not a PyTorch file")
        if not Unpickler(stream).load()["little_endian"]:
            raise Refused("big-endian files are not supported")
        unpickler = Unpickler(stream)
        chosen = _chosen(unpickler, choose)
        used = {tensor.storage for tensor in chosen.tensors.values()}
        data = {}
        for key in map(_plain, Unpickler(stream).load()):
            if key not in unpickler.storages:
                raise Refused(f"storage {key!s:.40} of unknown numbers")
            storage = unpickler.storages[key]
            (count,) = struct.unpack("<q", stream.read(8))
            if count != storage.count or storage.bytes > size - stream.tell():
                raise Refused(f"storage {key} of {count} elements does not fit into the file")
            if storage in used:
                data[storage] = stream.read(storage.bytes)
            else:
                stream.seek(storage.bytes, io.SEEK_CUR)
    return _viewed(chosen, data), chosen


def _viewed(chosen: Chosen, data: dict[Any, bytes]) -> Flat:
    return {
        name: tensor.view(data[tensor.storage] if tensor.storage else b"")
        for name, tensor in chosen.tensors.items()
    }


def _chosen(unpickler: "Unpickler", choose: Choose) -> Chosen:
    """Return the chosen tensors of a pickle; say how whole modules become weights."""
    tree = unpickler.load()
    try:
        return choose(tree)
    except Refused:
        if module := _module_in(tree):
            raise Refused(
                f"{module}, a whole PyTorch module and not its weights; where its code is "
                "installed: m = torch.load(FILE, weights_only=False)"
                f"{module.how}; torch.save(m.state_dict(), 'weights.pth')"
            ) from None
        raise


def _module_in(tree: Any) -> "_Module | None":
    if isinstance(tree, Inert):
        return _Module("holds", tree.kind, "") if tree.is_module else None
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Inert) and value.is_module:
            return _Module(f"holds under {key!r:.40}", value.kind, f"[{key!r:.40}]")
    return None


@dataclasses.dataclass(frozen=True)
class _Module:
    where: str
    kind: str
    how: str  # what follows torch.load to have it

    def __str__(self) -> str:
        return f"{self.where} a {self.kind}"


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
            raise Refused(f"storage {self.storage.key} has {len(data)} bytes")
        count = math.prod(self.shape)
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((extent - 1) * stride for extent, stride in steps)
        inside = min((self.offset, *self.shape, *self.strides)) >= 0
        if not inside or count > self.storage.count or (count and last >= self.storage.count):
            raise Refused(f"a tensor of shape {self.shape} reaches beyond its storage")
        if not count:
            return np.zeros(self.shape, self.storage.dtype)
        item = self.storage.dtype.itemsize
        flat = np.frombuffer(data, self.storage.dtype)[self.offset :]
        return np.lib.stride_tricks.as_strided(
            flat, self.shape, [stride * item for stride in self.strides], writeable=False
        )


class Inert:
    """Stand for an object, a function or a class of which only the name is known (`kind`)."""

    __slots__ = ("is_module", "name")

    def __init__(self, name: str = "object"):
        self.name, self.is_module = name, False

    @property
    def kind(self) -> str:
        """The name, fit to be shown."""
        return "".join(c if c.isprintable() else "?" for c in self.name[:60])


def _rebuild_tensor(storage, offset, shape, strides, *_unused) -> "_Tensor | Inert":
    complex_ = isinstance(storage, _Storage) and storage.dtype.kind == "c"
    if isinstance(storage, Inert) or complex_:  # no weights, or of numbers not known here
        return Inert("tensor of another type")
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    small = all(isinstance(n, int) and abs(n) < 1 << 63 for n in numbers)
    if not isinstance(storage, _Storage) or not small or len(shape) != len(strides):
        raise Refused("a tensor whose shape is no shape")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor, *_unused) -> Any:
    return tensor


def _plain(key: Any) -> Any:
    """Return a key of a dict if it is a string, a number or the like.

    Tuples of tuples of themselves are short in a pickle and take for ever to hash or to print.
    """
    if not _is_plain(key):
        raise Refused(f"a {type(key).__name__} as a name, which weights do not need")
    return key


def _is_plain(key: Any) -> bool:
    return isinstance(key, str | bytes | int | float | bool | None)


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    """Return an OrderedDict's content: Python 2 pickled its pairs as an argument."""
    return {_plain(key): value for key, value in pairs}


def _defaultdict(*_unused) -> dict[Any, Any]:
    return {}


# What is called by a pickle: these functions, and nothing else.
_CALLABLE = {
    ("collections", "OrderedDict"): _dict,
    ("collections", "defaultdict"): _defaultdict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    **pickled_arrays.CALLABLE,
}
_GLOBALS = _CALLABLE | {("torch", name): dtype for name, dtype in _STORAGES.items()}


# Python's own unpickler, not C's: that one sizes its buffers by what the file claims.
class Unpickler(pickle._Unpickler):
    """Build a tree of dicts, lists, scalars, unread tensors and inert stand-ins."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, stream):
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}
        self.texts: dict[int, Latin1] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name means here; whatever it is, nothing is imported."""
        known = _GLOBALS.get((module, name))
        return Inert(f"{module[:60]}.{name[:60]}") if known is None else known

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a class with its source code, as in old files of whole modules
        kind, dtype, key, _location, count, *_view = pid
        if isinstance(dtype, Inert) and kind == "storage":
            return Inert("storage")
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(_view):
            raise Refused(f"refused to load what is no storage, but {_plain(kind)!s:.40}")
        storage = _Storage(str(_plain(key)), dtype, int(_plain(count)))
        if storage.count < 0 or self.storages.setdefault(storage.key, storage) != storage:
            raise Refused(f"storage {key} is described twice, differently")
        return storage

    def load_reduce(self):
        """Call one of the functions that are known; of others make a stand-in."""
        args, function = self.stack.pop(), self.stack.pop()
        if function is Latin1 and args:  # of the same text once, however often it is asked for
            self.stack.append(self.texts.setdefault(id(args[0]), Latin1(args[0])))
        elif any(function is known for known in _CALLABLE.values()):
            self.stack.append(function(*args))
        else:
            self._stand_in(function)

    def load_newobj(self):
        """Make a stand-in of an object."""
        self.stack.pop()
        self._stand_in(self.stack.pop())

    def load_newobj_ex(self):
        """Make a stand-in of an object."""
        del self.stack[-2:]
        self._stand_in(self.stack.pop())

    def load_obj(self):
        """Make a stand-in of an object, as old pickles have it."""
        self._stand_in(self.pop_mark()[0])

    def load_inst(self):
        """Make a stand-in of an object, as the oldest pickles have it."""
        module, name = (self.readline()[:-1].decode("utf-8", "replace") for _ in range(2))
        self.pop_mark()
        self._stand_in(self.find_class(module, name))

    def _stand_in(self, of: Any) -> None:
        self.stack.append(Inert(of.name) if isinstance(of, Inert) else Inert())

    def load_build(self):
        """Drop the attributes of an object; note whether they are a PyTorch module's."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Array | Dtype):
            target.build(state)
        elif isinstance(target, Inert) and isinstance(state, dict):
            target.is_module = "_modules" in state and "_parameters" in state

    def load_append(self):
        """Add to a list, and to nothing else."""
        value = self.stack.pop()
        if isinstance(self.stack[-1], list):
            self.stack[-1].append(value)

    def load_appends(self):
        """Add to a list, and to nothing else."""
        values = self.pop_mark()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

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
        self.stack.append(made)

    def load_set(self):
        """Put a stand-in for an empty set: to fill it would hash what it gets."""
        self.stack.append(Inert("set"))

    def load_additems(self):
        """Drop the items of a set."""
        self.pop_mark()

    def load_frozenset(self):
        """Drop the items of a set that does not change, and put a stand-in."""
        self.pop_mark()
        self.stack.append(Inert("frozenset"))

    def load_bytearray(self):
        """Read bytes, as many as there are: the file may claim more."""
        (count,) = struct.unpack("<Q", self.read(8))
        self.read(min(count, 1 << 62))
        self.stack.append(Inert("bytearray"))

    @staticmethod
    def _set(target: Any, items: list[Any]) -> None:
        """Set items whose keys are names; others, as of optimizers, are not looked at."""
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if _is_plain(key))

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.OBJ[0]] = load_obj
    dispatch[pickle.INST[0]] = load_inst
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.EMPTY_SET[0]] = load_set
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray
    for _opcode in (pickle.EXT1, pickle.EXT2, pickle.EXT4):  # a registry of this process's
        del dispatch[_opcode[0]]
