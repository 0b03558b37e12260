"""Label tapes: what a teacher said of every example of a run, on disk, and of which run.

TAPE/lock         held by whoever records or joins (see session.alone)
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
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import tensorstore as ts

from deit_jax.errors import UserError
from deit_jax.step.objective import distillation
from deit_jax.storage import absolute, backend, exists, is_remote, read_json, write_json
from deit_jax.train.tape.layout import Layout, arrays_of, checksum, unpack
from deit_jax.workdir.directory import LOCK

FORMAT = 1
NAME = "tape.json"
CHUNK_STEPS = 1024  # 2 MB of labels at a batch of 1024: 367 files for 300 epochs of ImageNet
CLAIM_STEPS = 16384  # 23 files

# Bits of labels that are never set lie together and shrink to nothing.
COMPRESSOR = {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 2, "blocksize": 0}
REMEDY = "restore it from a copy, or remove it and record it again with `deit tape record`"

ELSEWHERE = "choose another config.teacher.tape_path"


class Tape:
    """A tape on disk. Raise UserError, naming file and remedy, where it is damaged."""

    def __init__(self, path: PurePath, layout: Layout, tapes_fingerprint: dict[str, Any]):
        self.path, self.layout, self.fingerprint = path, layout, tapes_fingerprint
        self._arrays = {name: self._open(name) for name in arrays_of(layout)}
        self._claims = self._open("recorded")
        self._block: tuple[int, dict[str, np.ndarray]] | None = None
        claims = self._result("recorded", self._claims.read())
        self.recorded, self.crc = claims[:, 0].copy(), claims[:, 1].copy()
        self._check_shapes()

    @classmethod
    def open(cls, path: PurePath) -> "Tape":
        """Open a tape that is there."""
        file = path / NAME
        try:
            content = read_json(file)
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror}); config.teacher.tape_path must be the "
                "directory of a label tape"
            ) from error
        given = content.get("fingerprint")
        if content.get("format") != FORMAT or not isinstance(given, dict):
            raise UserError(f"{file}: not a label tape of format {FORMAT}; {REMEDY}")
        numbers = (given.get("batch_size"), given.get("data.num_classes"), content.get("top_k"))
        fine = all(type(n) is int and n >= 0 for n in numbers) and numbers[0] and numbers[2]
        name = given.get("distill.kind")
        several = given.get("data.multi_label") is True
        kind = distillation(name, several) if isinstance(name, str) else None
        if not fine or kind is None or kind.tape is None:
            raise UserError(f"{file}: says no kind, batch, classes or top_k; {REMEDY}")
        size = given["batch_size"], given["data.num_classes"], content["top_k"]
        width = content.get("width", 0)
        return cls(path, Layout(given["distill.kind"], *size, several, width), given)

    @classmethod
    def create(cls, path: PurePath, layout: Layout, given: dict[str, Any], steps: int) -> "Tape":
        """Make an empty tape; raise UserError if it cannot be written."""
        try:
            backend(path).make_folder(path)
            if there := set(backend(path).names(path)):
                arrays = {*arrays_of(layout), "recorded", f"{NAME}.tmp", LOCK}  # of one cut off
                if there - arrays:
                    raise UserError(f"{path}: holds other files; choose another tape_path")
            for name, (dtype, shape) in arrays_of(layout).items():
                fill = {"i": -1, "u": 255, "f": "NaN"}[dtype.kind]
                _make(path / name, dtype, (steps, *shape), CHUNK_STEPS, fill)
            _make(path / "recorded", np.dtype(np.int64), (steps, 2), CLAIM_STEPS, -1)
            content = {"format": FORMAT, "top_k": layout.top_k, "fingerprint": given}
            content |= {"width": layout.width} if layout.width else {}
            write_json(path / NAME, content, indent=1)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: the label tape cannot be written ({first_line(error)}); {ELSEWHERE}"
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

    def target(self, step: int, rows: Sequence[int]):
        """Return the teacher's target for some rows of a recorded step; see unpack."""
        parts = self.parts(step)
        return unpack({name: part[list(rows)] for name, part in parts.items()}, self.layout)

    def parts(self, step: int) -> dict[str, np.ndarray]:
        """Return what the arrays hold of a recorded step; raise UserError if it has changed."""
        parts = {name: array[step % CHUNK_STEPS] for name, array in self.block(step).items()}
        if checksum(parts) != self.crc[step] or not self._makes_sense(parts):
            raise UserError(f"{self.path}: step {step} has changed since it was written; {REMEDY}")
        return parts

    def block(self, step: int) -> dict[str, np.ndarray]:
        """Return the arrays' chunk in which a step lies, recorded or not."""
        block = step // CHUNK_STEPS
        if self._block is None or self._block[0] != block:
            part = slice(block * CHUNK_STEPS, min((block + 1) * CHUNK_STEPS, len(self)))
            reads = {name: array[part].read() for name, array in self._arrays.items()}
            self._block = block, {name: self._result(name, r) for name, r in reads.items()}
        return self._block[1]

    def _makes_sense(self, parts) -> bool:
        # Bytes are bits, one a class, which all make sense.
        classes = [part for part in parts.values() if part.dtype.kind == "i"]
        return all(np.all((x >= 0) & (x < self.layout.num_classes)) for x in classes)

    def must_be_writable(self) -> None:
        """Raise UserError if the tape cannot be added to."""
        for place in (self.path, *(self.path / name for name in (*self._arrays, "recorded"))):
            try:
                backend(place).must_be_writable(place)
            except OSError as error:
                raise UserError(
                    f"{place}: cannot be written; make it writable, or {ELSEWHERE}"
                ) from error

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except ValueError as error:  # as TensorStore reports what the system says
            raise UserError(
                f"{self.path}: cannot be written ({first_line(error)}); make room, or {ELSEWHERE}"
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
        self.crc = np.concatenate([self.crc, more])

    def forget(self, first: int, keep: int) -> None:
        """Claim no step from `first` on that was recorded under other than `keep` rollbacks."""
        stale = first + np.flatnonzero(~np.isin(self.recorded[first:], (-1, keep)))
        if len(stale):
            self.recorded[stale] = self.crc[stale] = -1
            with self._writing():
                self._write_claims(int(stale[0]), int(stale[-1]) + 1)

    def write(self, first: int, parts: dict[str, np.ndarray]) -> list[Any]:
        """Start writing some consecutive steps, one more axis in front; return what to wait for."""
        count = len(next(iter(parts.values())))
        self._block = None
        return [self._arrays[n][first : first + count].write(part) for n, part in parts.items()]

    def claim(
        self, steps: np.ndarray, rollbacks: int | np.ndarray, sums: Sequence[int] | np.ndarray
    ) -> None:
        """Say that steps have been written; raise ValueError, nothing claimed, if it fails."""
        before = self.recorded.copy(), self.crc.copy()
        self.recorded[steps], self.crc[steps] = rollbacks, sums
        try:
            self._write_claims(int(min(steps)), int(max(steps)) + 1)
        except ValueError:
            self.recorded, self.crc = before
            raise

    def _write_claims(self, first: int, stop: int) -> None:
        both = np.stack([self.recorded[first:stop], self.crc[first:stop]], axis=1)
        self._claims[first:stop].write(both).result()

    def _open(self, name: str):
        try:
            return ts.open(_spec(self.path / name), open=True).result()
        except (ValueError, OSError) as error:
            reason = "missing" if not exists(self.path / name) else first_line(error)
            raise UserError(f"{self.path / name}: cannot be read ({reason}); {REMEDY}") from error

    def _result(self, name: str, future) -> np.ndarray:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise UserError(
                f"{self.path / name}: cannot be read ({first_line(error)}); {REMEDY}"
            ) from error

    def _check_shapes(self) -> None:
        steps = len(self.recorded)
        for name, (dtype, step_shape) in arrays_of(self.layout).items():
            shape = (steps, *step_shape)
            array = self._arrays[name]
            # After an extension that was cut off, the arrays are longer than what is claimed.
            fine = array.shape[1:] == shape[1:] and array.shape[0] >= steps
            if not fine or array.dtype.numpy_dtype != dtype:
                found = f"{array.dtype.name} {list(array.shape)}"
                raise UserError(
                    f"{self.path / name}: holds {found}, not {dtype.name} {list(shape)}; {REMEDY}"
                )


def features_width(path: PurePath) -> int:
    """Return the width of the features on a tape, 0 where there are none, or no tape yet."""
    return Tape.open(path).layout.width if exists(path / NAME) else 0


def runs_of(steps: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Return ascending steps as runs without a gap."""
    steps = np.asarray(steps, np.int64)
    cut = np.split(steps, np.flatnonzero(np.diff(steps) != 1) + 1)
    return [run for run in cut if len(run)]


def _spec(path: PurePath) -> dict[str, Any]:
    kvstore = {"driver": "file", "path": f"{absolute(path)}/"}
    if reason := backend(path).why_no_runs:
        raise UserError(f"{path}: {reason}")
    if is_remote(path):
        bucket, _, inside = str(path).removeprefix("gs://").partition("/")
        kvstore = {"driver": "gcs", "bucket": bucket, "path": f"{inside}/"}
    return {"driver": "zarr", "kvstore": kvstore}


def _make(path: PurePath, dtype: np.dtype, shape: tuple[int, ...], chunk: int, fill) -> None:
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


def first_line(error: Exception) -> str:
    return (getattr(error, "strerror", None) or next(iter(str(error).splitlines()), ""))[:200]
