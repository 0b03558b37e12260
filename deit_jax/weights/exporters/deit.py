"""PyTorch files as facebookresearch/deit writes them, made without PyTorch."""

import io
import pickle
import zipfile
from pathlib import PurePath
from typing import Any

import numpy as np

from deit_jax.storage import backend
from deit_jax.weights.fit import LoadedWeights
from deit_jax.weights.torch_names import to_torch

_STORAGES = {"float32": "FloatStorage", "int64": "LongStorage"}


def write(opened: LoadedWeights, path: PurePath) -> None:
    """Write {"model": tensors} in PyTorch's zip format, with facebookresearch/deit's names.

    The file does not say which model it is of.
    """
    flat = to_torch(opened.variables, "deit")
    tensors = b"".join(_atom(name) + _tensor(i, x) for i, (name, x) in enumerate(flat.items()))
    tree = b"\x80\x02}(" + _atom("model") + b"}(" + tensors + b"uu."
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", tree)
        archive.writestr("archive/byteorder", "little")
        for i, value in enumerate(flat.values()):
            little = value.astype(value.dtype.newbyteorder("<"))
            archive.writestr(f"archive/data/{i}", little.tobytes())
        archive.writestr("archive/version", "3\n")
    backend(path).write(path, content.getvalue())


def _atom(value: Any) -> bytes:
    """Return the opcodes that push a string, a number or a tuple of them."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _tensor(key: int, value: np.ndarray) -> bytes:
    """Return the opcodes that rebuild a tensor from storage `key`.

    They call torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks).
    """
    storage = f"ctorch\n{_STORAGES[value.dtype.name]}\n".encode()
    place = _atom(str(key)) + _atom("cpu") + _atom(value.size)
    strides = tuple(step // value.itemsize for step in value.strides)
    shape = _atom(0) + _atom(value.shape) + _atom(strides) + _atom(False)
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + (_atom("storage") + storage + place + b"tQ")
        + (shape + hooks + b"tR")
    )
