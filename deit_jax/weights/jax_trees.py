"""Read weights of other JAX code: .npz files, Flax's msgpack, Orbax folders.

Their trees become PyTorch's names and layouts, so that all that follows knows one kind of names.
The names of layers are ours, Hugging Face's, or those of Google's vision_transformer and big_vision
(models/deit.py: GOOGLE_NAMES).
"""

import difflib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp

from deit_jax.data.channels import array_in
from deit_jax.errors import UserError
from deit_jax.models import limits
from deit_jax.weights.pickles import check_entries
from deit_jax.weights.places import OPTIMIZER, Refused

Tree = dict[str, np.ndarray]
_DEPTH = 50  # dicts in dicts that are looked into
_LONGEST = 10_000  # lists in a msgpack, for which memory is taken before they are read
_ORBAX = "_METADATA"
_USUAL = ("params", "default", "state", "model", "items")  # parts of a checkpoint, best first
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_SCANNED = "encoderblock"  # layers of big_vision in one array, along its first axis
_COLLECTIONS = ("params", "batch_stats")
_FEATURES = ("query", "key", "value")


def read_npz(path: Path, size: int) -> Tree:
    """Return the arrays of a .npz file by their names; nothing in it is unpickled."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        check_entries(archive, size)
        for entry in archive.namelist():
            name = entry.removesuffix(".npy").removeprefix("opt/target/")
            if not any(OPTIMIZER.fullmatch(part) for part in name.split("/")):
                arrays[name] = _npy(archive.read(entry))
    return arrays


def _npy(content: bytes) -> np.ndarray:
    """Return the array in a .npy file; two bytes of no type are big_vision's bfloat16."""
    if b"V2'" not in content[:200]:
        return array_in(content)
    typed = re.sub(rb"'[<|]V2'", b"'<u2'", content, count=1)
    return array_in(typed).view(ml_dtypes.bfloat16)


def read_msgpack(path: Path) -> Tree:
    """Return the arrays in a file of flax.serialization by their paths."""
    tree = msgpack.unpackb(
        path.read_bytes(),
        ext_hook=_flax_array,
        raw=False,
        strict_map_key=False,
        max_array_len=_LONGEST,
    )
    return dict(_arrays(tree))


def _flax_array(code: int, data: bytes) -> np.ndarray | None:
    """Return the array in an extension of Flax's, None for other extensions."""
    if code != 1:
        return None
    shape, dtype, numbers = msgpack.unpackb(data, raw=True, max_array_len=64)
    return np.frombuffer(numbers, np.dtype(dtype.decode())).reshape(shape)


def checkpoint_in(folder: Path) -> Path | None:
    """Return the tree of an Orbax checkpoint in a folder, of several steps the newest's.

    None where there is none; UserError where there are several of other names than the usual.
    """
    if (folder / _ORBAX).is_file():
        return folder
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    if steps := [path for path in inside if path.name.isdecimal()]:
        return checkpoint_in(max(steps, key=lambda path: int(path.name)))
    parts = {path.name: path for path in inside if (path / _ORBAX).is_file()}
    for name in _USUAL if len(parts) > 1 else parts:
        if name in parts:
            return parts[name]
    if parts:
        raise UserError(f"{folder}: several trees: {', '.join(parts)}; give the folder of one")
    return None


def read_orbax(folder: Path) -> Tree:
    """Return the arrays of a tree that Orbax saved, whatever devices it was saved from."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder)
        for attribute in ("item_metadata", "tree"):
            tree = getattr(tree, attribute, tree)
        if not isinstance(tree, dict):
            raise Refused("an Orbax checkpoint that tells of no tree of arrays")
        wanted = {key: value for key, value in tree.items() if not OPTIMIZER.fullmatch(str(key))}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        return dict(_arrays(checkpointer.restore(folder, args=args)))


def _arrays(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays of dicts in dicts by their paths; optimizers' states are left out."""
    ahead: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while ahead:
        path, node = ahead.pop()
        if isinstance(node, np.ndarray) and node.ndim:  # a scalar is no layer
            yield "/".join(path), node
        elif isinstance(node, Mapping) and len(path) < _DEPTH:
            for key, value in node.items():
                if not OPTIMIZER.fullmatch(str(key)):
                    ahead.append(((*path, str(key)), value))


def to_torch(tree: Mapping[str, np.ndarray]) -> Tree:
    """Return a tree's arrays under PyTorch's names and with its layouts.

    Raise Refused where two have one name.
    """
    flat: Tree = {}
    for path, value in tree.items():
        parts = [part for part in path.split("/") if part not in _COLLECTIONS]
        layers = value if _SCANNED in parts else [value]
        if len(layers) > limits.COUNT:
            raise Refused(f"{path:.80} is of {len(layers)} layers")
        for number, layer in enumerate(layers):
            named = [f"{part}_{number}" if part == _SCANNED else part for part in parts]
            name = ".".join(map(_module, [*named[:-1], _LEAVES.get(named[-1], named[-1])]))
            if flat.setdefault(name, array := _as_torch(named, layer)) is not array:
                raise Refused(f"two arrays are both {name:.80}")
    return flat


def _module(part: str) -> str:
    """Return `blocks.0` for our `blocks_0`; other modules are called as they are."""
    return part.replace("_", ".") if part.startswith("blocks_") else part


def _as_torch(parts: list[str], value: np.ndarray) -> np.ndarray:
    *modules, leaf = ["", "", *parts]
    if value.ndim == 2 and leaf == "bias" and modules[-1] in _FEATURES:
        return value.reshape(-1)  # of all heads
    if leaf != "kernel":
        return value
    if value.ndim == 3 and modules[-1] in _FEATURES:
        value = value.reshape(len(value), -1)  # [D heads d]
    elif value.ndim == 3 and modules[-1] == "out":
        value = value.reshape(-1, value.shape[-1])  # [heads d D]
    return value.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, range(value.ndim)))


def heads_of(tree: Mapping[str, np.ndarray]) -> int | None:
    """Return the number of attention's heads, which a kernel [D heads d] tells of."""
    kernels = [value for name, value in tree.items() if name.endswith("/query/kernel")]
    shapes = {value.shape[-2] for value in kernels if value.ndim >= 3}
    return shapes.pop() if len(shapes) == 1 else None


def check_is_known(tensors: Mapping[str, Any], recognised: bool) -> None:
    """Raise Refused for a tree in which no model is recognised, or one without a class token."""
    if not recognised:
        wanted = ("patch_embed.proj.weight", "embedding.weight", "patch_embeddings.projection")
        near = [difflib.get_close_matches(w, list(tensors)[:2000], n=1, cutoff=0) for w in wanted]
        names = ", ".join(dict.fromkeys(f"{name:.60}" for one in near for name in one))
        raise Refused(
            "no model's names among its arrays; the nearest to a first layer's are "
            f"{names or 'none'}"
        )
    if is_googles(tensors) and "cls" not in tensors:
        raise Refused(
            "no class token (cls): its head reads the mean of the patches or a MAPHead, the models "
            "here the class token"
        )


def is_googles(tensors: Mapping[str, Any]) -> bool:
    """Return whether a model's tensors have the names of vision_transformer or big_vision."""
    return "embedding.weight" in tensors and any(n.startswith("Transformer.") for n in tensors)
