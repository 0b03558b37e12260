"""Features of images in a file, written as they come and taken up again where that ended.

OUT.npy is an array [n …], and OUT.paths.txt has the path of each row. OUT.parquet has both: columns
`path` and `embedding`, of a fixed length. While it grows the array is OUT.partial, and
OUT.partial.json says how far it has come; both are gone at the end.
"""

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deit_jax.errors import UserError

SUFFIXES = (".npy", ".parquet")
ROWS = 1024  # of a parquet file that are in memory at a time, of small rows


@dataclasses.dataclass
class FeatureFile:
    """A file of features under way.

    `identity` is what it is of: what was begun with another one is not taken up. `images` are the
    paths of all, `done` how many of them were read, `missing` the numbers of those that could not.
    """

    out: Path
    identity: dict[str, Any]
    images: Sequence[str]
    row_shape: tuple[int, ...]
    dtype: np.dtype
    done: int = 0
    missing: list[int] = dataclasses.field(default_factory=list)

    @property
    def partial(self) -> Path:
        """The array while it grows."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def progress(self) -> Path:
        """How far it has come."""
        return self.out.with_name(f"{self.out.name}.partial.json")

    @property
    def paths(self) -> Path:
        """The paths of the rows, beside an array."""
        return self.out.with_suffix(".paths.txt")

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.done - len(self.missing)

    def header(self, rows: int) -> bytes:
        """Return an array's header, as long for any number of rows: NumPy leaves room for it."""
        head = io.BytesIO()
        shape = (rows, *self.row_shape)
        described = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, described)
        return head.getvalue()

    def begin(self, force: bool) -> None:
        """Take up what was begun, or begin; raise UserError where something else is in the way."""
        if self.out.suffix not in SUFFIXES:
            raise UserError(f"--out={self.out}: features are {' or '.join(SUFFIXES)} files")
        odd = next((p for p in self.images if "\n" in p), None)
        if odd and self.out.suffix == ".npy":
            raise UserError(
                f"{odd!r}: a name with a line break cannot be listed; rename it, or write .parquet"
            )
        if self.out.exists() and not force:
            raise UserError(f"--out={self.out}: exists; --force overwrites it")
        with self._explained():
            if self.progress.exists() and self.partial.exists() and not force:
                self._take_up()
            else:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self.partial.write_bytes(self.header(0))

    def _take_up(self) -> None:
        try:
            begun = json.loads(self.progress.read_text())
            done, missing, identity = begun["done"], begun["missing"], begun["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.progress}: does not say how far it came; --force begins anew"
            ) from error
        if identity != self.identity:
            keys = self.identity.keys() | identity.keys()
            other = [k for k in sorted(keys) if identity.get(k) != self.identity.get(k)]
            raise UserError(
                f"{self.partial}: was begun with other {', '.join(other)}; --force begins anew"
            )
        self.done, self.missing = done, missing
        size = len(self.header(0)) + self.rows * self._row_bytes
        if self.partial.stat().st_size < size:
            raise UserError(f"{self.partial}: cut short; --force begins anew")
        os.truncate(self.partial, size)  # what was written after the last note of progress

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.row_shape)) * self.dtype.itemsize

    def append(self, read: np.ndarray, features: np.ndarray, images: int) -> None:
        """Add the features of the next so many images, those `read` by their numbers."""
        with np.errstate(over="ignore"):  # which is told of below
            features = np.ascontiguousarray(features, self.dtype)
        if not np.isfinite(features).all():
            raise UserError(
                f"--out={self.out}: features that are not finite in {self.dtype}; the weights are "
                "damaged, or the numbers too large for it"
            )
        last = self.done + images
        self.missing += sorted(set(range(self.done, last)) - set(read.tolist()))
        self.done = last
        with self._explained():
            with self.partial.open("ab") as file:
                file.write(features.tobytes())
            note = {"done": self.done, "missing": self.missing, "identity": self.identity}
            temporary = self.progress.with_name(f"{self.progress.name}.tmp")
            temporary.write_text(json.dumps(note))
            temporary.replace(self.progress)

    def finish(self) -> None:
        """Put the whole file in its place."""
        with self._explained():
            with self.partial.open("r+b") as file:
                file.write(self.header(self.rows))
            if self.out.suffix == ".npy":
                lines = "".join(f"{path}\n" for path in self._readable())
                self.paths.write_bytes(lines.encode("utf-8", "surrogateescape"))
                self.partial.replace(self.out)
            else:
                self._write_parquet()
                self.partial.unlink()
            self.progress.unlink(missing_ok=True)

    def _readable(self) -> Iterator[str]:
        missing = set(self.missing)
        return (path for i, path in enumerate(self.images) if i not in missing)

    def _write_parquet(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        values = np.load(self.partial, mmap_mode="r") if self.rows else np.empty((0,))
        length = int(np.prod(self.row_shape))
        kind = pa.list_(pa.from_numpy_dtype(self.dtype), length)
        about = {"shape": json.dumps(self.row_shape), "deit_jax": json.dumps(self.identity)}
        schema = pa.schema([("path", pa.string()), ("embedding", kind)], metadata=about)
        paths, step = self._readable(), max(1, ROWS * 1024 // max(1024, length))
        temporary = self.out.with_name(f"{self.out.name}.tmp")
        with pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, self.rows, step):
                some = np.ascontiguousarray(values[start : start + step]).reshape(-1)
                names = [next(paths) for _ in range(len(some) // length)]
                # Parquet's strings are UTF-8.
                texts = [name.encode("utf-8", "replace").decode() for name in names]
                array = pa.FixedSizeListArray.from_arrays(pa.array(some), length)
                writer.write_table(pa.table({"path": texts, "embedding": array}, schema=schema))
        temporary.replace(self.out)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--out={self.out}: cannot be written ({reason})") from error
