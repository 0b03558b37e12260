"""Label tapes: what a teacher said of every example of a run, on disk, and of which run.

TAPE/tape.json    the fingerprint: everything that shapes a view or the teacher's answer to it
TAPE/recorded     [steps, 2] int64: how often the run had rolled back when the step was recorded (-1
                  = nothing is) and the CRC-32 of what the arrays below hold of the step
TAPE/labels       [steps, B] for hard distillation: the teacher's label
TAPE/logits       [steps, B, k] float16 for soft: its k largest log-probabilities; TAPE/indices
                  their classes; TAPE/rest [steps, B] the logarithm of all the others' probability

The arrays are zarr, chunked over steps. Steps count from 0, as batches do. What is not claimed in
`recorded` counts for nothing, so that a tape may be cut off at any moment.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import Array, Float, Int, Num

from deit_jax import config as config_lib
from deit_jax.errors import UserError
from deit_jax.optim import path_name

FORMAT = 1
NAME = "tape.json"
CHUNK_STEPS = 1024  # 2 MB of labels at a batch of 1024: 367 files for 300 epochs of ImageNet
CLAIM_STEPS = 16384  # 23 files
LOWEST = -6e4  # of a logarithm that float16 holds
# Bits of labels that are never set lie together and shrink to nothing.
COMPRESSOR = {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 2, "blocksize": 0}
REMEDY = "restore it from a copy, or remove it and record it again with `deit tape record`"
# One more with every change that makes other views of the same fields: 2 draws mixup's lambda anew.
VIEWS = 2
ELSEWHERE = "choose another config.teacher.tape_path"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The arrays of a tape. `top_k` is the number of classes kept for soft distillation."""

    kind: str
    batch_size: int
    num_classes: int
    top_k: int

    @property
    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Return for each array its dtype and the shape of one step in it."""
        label = np.dtype(np.int16 if self.num_classes <= 2**15 else np.int32)
        rows, half = (self.batch_size,), np.dtype(np.float16)
        if self.kind == "hard":
            return {"labels": (label, rows)}
        top = (*rows, self.top_k)
        return {"indices": (label, top), "logits": (half, top), "rest": (half, rows)}


def pack(signal: Int[Array, "B"] | Float[Array, "B K"], layout: Layout) -> dict[str, Array]:
    """Return a teacher's labels or logits in the form of the tape's arrays, on the device."""
    dtype = {name: kind for name, (kind, _) in layout.arrays.items()}
    if layout.kind == "hard":
        return {"labels": signal.astype(dtype["labels"])}
    logs = jax.nn.log_softmax(signal.astype(jnp.float32))
    top, indices = jax.lax.top_k(logs, layout.top_k)
    kept = jnp.zeros(logs.shape, bool).at[jnp.arange(len(logs))[:, None], indices].set(True)
    rest = jax.nn.logsumexp(jnp.where(kept, -jnp.inf, logs), axis=-1)
    parts = {"indices": indices, "logits": jnp.maximum(top, LOWEST)}
    parts["rest"] = jnp.maximum(rest, LOWEST)
    return {name: part.astype(dtype[name]) for name, part in parts.items()}


def unpack(
    parts: dict[str, Num[np.ndarray, "b ..."]], layout: Layout
) -> Int[np.ndarray, "b"] | Float[np.ndarray, "b K"]:
    """Return labels (int32), or logits (float32) whose softmax is what the tape knows.

    The classes that were not kept share the rest of the probability evenly.
    """
    if layout.kind == "hard":
        return parts["labels"].astype(np.int32)
    others = max(1, layout.num_classes - layout.top_k)
    even = parts["rest"].astype(np.float32) - np.float32(np.log(others))
    logits = np.repeat(even[:, None], layout.num_classes, axis=1)
    indices = parts["indices"].astype(np.int64)
    np.put_along_axis(logits, indices, parts["logits"].astype(np.float32), axis=1)
    return logits


def packing(step, layout: Layout):
    """Return a train step whose metrics hold the signal in the form of the tape's arrays."""

    def packed(*args):
        state, metrics = step(*args)
        return state, {**metrics, "signal": pack(metrics["signal"], layout)}

    return packed


def checksum(parts: dict[str, np.ndarray]) -> int:
    """Return the CRC-32 of one step's arrays, in the order of their names."""
    crc = 0
    for name in sorted(parts):
        crc = zlib.crc32(np.ascontiguousarray(parts[name]), crc)
    return crc


def fingerprint(config, dataset, teacher) -> dict[str, Any]:
    """Return all that decides views and answers: {field: value}, as JSON has it.

    `teacher` is what load_teacher returns, None without one: its fields are then None.
    """
    flat = config_lib.flatten(config_lib.to_json(config))
    names = ("seed", "batch_size", "distill.kind", "data.source", "data.train_split")
    names += ("data.decoder", "data.mean", "data.std")
    names += tuple(k for k in flat if k.startswith(("augment.", "mixing.")))
    labels = getattr(dataset.train, "labels", None)  # TFDS's are not known without reading all
    found = {name: flat[name] for name in names} | {
        "views": VIEWS,
        "data.images": len(dataset.train),
        "data.labels": None if labels is None else _sha256(np.asarray(labels, np.int64)),
        "data.num_classes": len(dataset.classes),
        "data.classes": _sha256(np.frombuffer("\n".join(dataset.classes).encode(), np.uint8)),
        "image_size": config_lib.image_size(config.model),
        "dtype": config_lib.compute_dtype(config.dtype).name,
    }
    fields = ("model", "sha256", "image_size", "mean", "std")
    known = dict.fromkeys(f"teacher.{field}" for field in fields)
    if teacher is not None:
        network, params = teacher
        count = sum(x.size for x in jax.tree.leaves(params))
        known = {
            "teacher.model": f"{type(network.model).__name__} of {count} parameters",
            "teacher.sha256": parameters_sha256(params),
            "teacher.image_size": network.image_size,
            "teacher.mean": list(network.mean),
            "teacher.std": list(network.std),
        }
    return found | known


def parameters_sha256(params) -> str:
    """Return a checksum of parameters: of their paths, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in sorted(leaves, key=lambda item: path_name(item[0])):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path_name(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def check_fingerprint(path: Path, tapes: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise UserError with every field that differs; a teacher that is not known differs not."""
    keys = [k for k in own if not (k.startswith("teacher.") and own[k] is None)]
    other = [k for k in keys if tapes.get(k) != own[k]]
    other += sorted(k for k in tapes if k not in own)
    if other:
        fields = "; ".join(f"{k}: {tapes.get(k)} there, {own.get(k)} here" for k in other)
        raise UserError(
            f"{path}: this label tape was recorded for other views or another teacher ({fields}); "
            "restore these values, or record another tape at another config.teacher.tape_path"
        )


class Tape:
    """A tape on disk. Raise UserError, naming file and remedy, where it is damaged."""

    def __init__(self, path: Path, layout: Layout, tapes_fingerprint: dict[str, Any]):
        self.path, self.layout, self.fingerprint = path, layout, tapes_fingerprint
        self._arrays = {name: self._open(name) for name in layout.arrays}
        self._claims = self._open("recorded")
        self._block: tuple[int, dict[str, np.ndarray]] | None = None
        claims = self._result("recorded", self._claims.read())
        self.recorded, self._crc = claims[:, 0].copy(), claims[:, 1].copy()
        self._check_shapes()

    @classmethod
    def open(cls, path: Path) -> "Tape":
        """Open a tape that is there."""
        file = path / NAME
        try:
            content = config_lib.read_json(file)
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror}); config.teacher.tape_path must be the "
                "directory of a label tape"
            ) from error
        given = content.get("fingerprint")
        if content.get("format") != FORMAT or not isinstance(given, dict):
            raise UserError(f"{file}: not a label tape of format {FORMAT}; {REMEDY}")
        numbers = (given.get("batch_size"), given.get("data.num_classes"), content.get("top_k"))
        fine = all(type(n) is int and n > 0 for n in numbers)
        if not fine or given.get("distill.kind") not in ("hard", "soft"):
            raise UserError(f"{file}: says no kind, batch, classes or top_k; {REMEDY}")
        return cls(path, Layout(given["distill.kind"], *numbers), given)

    @classmethod
    def create(cls, path: Path, layout: Layout, given: dict[str, Any], steps: int) -> "Tape":
        """Make an empty tape; raise UserError if it cannot be written."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                arrays = {*layout.arrays, "recorded", f"{NAME}.tmp"}  # of one that was cut off
                if {p.name for p in path.iterdir()} - arrays:
                    raise UserError(f"{path}: holds other files; choose another tape_path")
            for name, (dtype, shape) in layout.arrays.items():
                fill = -1 if np.issubdtype(dtype, np.integer) else "NaN"
                _make(path / name, dtype, (steps, *shape), CHUNK_STEPS, fill)
            _make(path / "recorded", np.dtype(np.int64), (steps, 2), CLAIM_STEPS, -1)
            temporary = path / f"{NAME}.tmp"
            content = {"format": FORMAT, "top_k": layout.top_k, "fingerprint": given}
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            temporary.replace(path / NAME)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: the label tape cannot be written ({_first_line(error)}); {ELSEWHERE}"
            ) from error
        return cls.open(path)

    def __len__(self) -> int:
        """Return how many steps there is room for."""
        return len(self.recorded)

    def has(self, step: int, rollbacks: int) -> bool:
        """Return whether a step was recorded under so many rollbacks."""
        return step < len(self) and int(self.recorded[step]) == rollbacks

    def holes(self, first: int, stop: int, rollbacks: int) -> np.ndarray:
        """Return the steps first … stop - 1 that were not recorded under so many rollbacks."""
        there = self.recorded[first : min(stop, len(self))] == rollbacks
        beyond = np.arange(max(first, len(self)), stop)
        return np.concatenate([first + np.flatnonzero(~there), beyond])

    def signal(self, step: int, rows: Sequence[int]):
        """Return what the teacher said of some rows of a recorded step; see unpack."""
        block, within = divmod(step, CHUNK_STEPS)
        if self._block is None or self._block[0] != block:
            part = slice(block * CHUNK_STEPS, min((block + 1) * CHUNK_STEPS, len(self)))
            reads = {name: array[part].read() for name, array in self._arrays.items()}
            self._block = block, {name: self._result(name, r) for name, r in reads.items()}
        parts = {name: array[within] for name, array in self._block[1].items()}
        if checksum(parts) != self._crc[step] or not self._makes_sense(parts):
            raise UserError(f"{self.path}: step {step} has changed since it was written; {REMEDY}")
        return unpack({name: part[list(rows)] for name, part in parts.items()}, self.layout)

    def _makes_sense(self, parts) -> bool:
        labels = parts["labels" if self.layout.kind == "hard" else "indices"]
        return bool(np.all((labels >= 0) & (labels < self.layout.num_classes)))

    def must_be_writable(self) -> None:
        """Raise UserError if the tape cannot be added to."""
        for place in (self.path, *(self.path / name for name in (*self._arrays, "recorded"))):
            if not os.access(place, os.W_OK):
                raise UserError(f"{place}: cannot be written; make it writable, or {ELSEWHERE}")

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except ValueError as error:  # as TensorStore reports what the system says
            raise UserError(
                f"{self.path}: cannot be written ({_first_line(error)}); make room, or {ELSEWHERE}"
            ) from error

    def make_room(self, steps: int) -> None:
        """Let there be at least so many steps; raise UserError if it cannot be written."""
        if steps <= len(self):
            return
        with self._writing():  # `recorded` last: its length is the tape's
            for name, array in self._arrays.items():
                self._arrays[name] = _longer(array, steps)
            self._claims = _longer(self._claims, steps)
        more = np.full(steps - len(self), -1, np.int64)
        self.recorded = np.concatenate([self.recorded, more])
        self._crc = np.concatenate([self._crc, more])

    def forget(self, first: int, keep: int) -> None:
        """Claim no step from `first` on that was recorded under other than `keep` rollbacks."""
        stale = first + np.flatnonzero(~np.isin(self.recorded[first:], (-1, keep)))
        if len(stale):
            self.recorded[stale] = self._crc[stale] = -1
            with self._writing():
                self._write_claims(int(stale[0]), int(stale[-1]) + 1)

    def write(self, first: int, parts: dict[str, np.ndarray]) -> list[Any]:
        """Start writing some consecutive steps, one more axis in front; return what to wait for."""
        count = len(next(iter(parts.values())))
        self._block = None
        return [self._arrays[n][first : first + count].write(part) for n, part in parts.items()]

    def claim(self, steps: np.ndarray, rollbacks: int, sums: Sequence[int]) -> None:
        """Say that steps have been written; raise ValueError, nothing claimed, if it fails."""
        before = self.recorded.copy(), self._crc.copy()
        self.recorded[steps], self._crc[steps] = rollbacks, sums
        try:
            self._write_claims(int(min(steps)), int(max(steps)) + 1)
        except ValueError:
            self.recorded, self._crc = before
            raise

    def _write_claims(self, first: int, stop: int) -> None:
        both = np.stack([self.recorded[first:stop], self._crc[first:stop]], axis=1)
        self._claims[first:stop].write(both).result()

    def _open(self, name: str):
        try:
            return ts.open(_spec(self.path / name), open=True).result()
        except (ValueError, OSError) as error:
            reason = "missing" if not (self.path / name).exists() else _first_line(error)
            raise UserError(f"{self.path / name}: cannot be read ({reason}); {REMEDY}") from error

    def _result(self, name: str, future) -> np.ndarray:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise UserError(
                f"{self.path / name}: cannot be read ({_first_line(error)}); {REMEDY}"
            ) from error

    def _check_shapes(self) -> None:
        steps = len(self.recorded)
        expected = {n: (dtype, (steps, *shape)) for n, (dtype, shape) in self.layout.arrays.items()}
        for name, (dtype, shape) in expected.items():
            array = self._arrays[name]
            # After an extension that was cut off, the arrays are longer than what is claimed.
            fine = array.shape[1:] == shape[1:] and array.shape[0] >= steps
            if not fine or array.dtype.numpy_dtype != dtype:
                found = f"{array.dtype.name} {list(array.shape)}"
                raise UserError(
                    f"{self.path / name}: holds {found}, not {dtype.name} {list(shape)}; {REMEDY}"
                )


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}


def _make(path: Path, dtype: np.dtype, shape: tuple[int, ...], chunk: int, fill) -> None:
    metadata = {
        "shape": shape,
        "chunks": (chunk, *shape[1:]),
        "dtype": dtype.str,
        "fill_value": fill,
        "compressor": COMPRESSOR,
    }
    ts.open({**_spec(path), "metadata": metadata}, create=True, delete_existing=True).result()


def _longer(array, steps: int):
    room = max(steps, array.shape[0])
    return array.resize(exclusive_max=(room, *array.shape[1:]), expand_only=True).result()


def _first_line(error: Exception) -> str:
    return (getattr(error, "strerror", None) or next(iter(str(error).splitlines()), ""))[:200]
