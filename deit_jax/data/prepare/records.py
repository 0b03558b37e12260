"""TFRecord files of TFDS for `deit prepare`, read without TensorFlow."""

import dataclasses
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deit_jax.data.prepare.tables import Example
from deit_jax.errors import UserError

LENGTH = struct.Struct("<Q")  # of a record, then four bytes of checksum; four more follow it


@dataclasses.dataclass(frozen=True)
class RecordShard:
    """A TFRecord file of the TFDS data set in `folder`; `keys` are its image and its label."""

    path: str
    folder: str
    rows: int
    bytes: int
    keys: tuple[str, str]

    def __len__(self) -> int:
        return self.rows

    def facts(self) -> list:
        """Return what tells these images from others."""
        return [(os.path.basename(self.path), self.rows, self.bytes, self.keys)]

    def read(self) -> Iterator[Example]:
        """Iterate over the examples; raise UserError if the file is damaged."""
        import tensorflow_datasets as tfds

        features = tfds.builder_from_directory(self.folder).info.features
        image, label = self.keys
        decoders = {image: tfds.decode.SkipDecoding()}
        count = 0
        for record in _records(self.path):
            place = f"{os.path.basename(self.path)}:{count}"
            try:
                example = features.deserialize_example_np(record, decoders=decoders)
            except Exception as error:  # damaged bytes make the parser raise almost anything
                raise UserError(f"{self.path}:{count}: no example of TFDS ({error})") from error
            name = example.get("file_name", place)
            name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
            yield Example(name, int(example[label]), example[image])
            count += 1
        if count != self.rows:
            raise UserError(f"{self.path}: {count} examples, where its data set notes {self.rows}")


def _records(path: str) -> Iterator[bytes]:
    """Iterate over a TFRecord file's records, whose checksums are not looked at."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while head := file.read(LENGTH.size + 4):
                length = LENGTH.unpack(head[: LENGTH.size])[0] if len(head) == 12 else size
                if file.tell() + length + 4 > size:
                    raise UserError(f"{path}: damaged or cut short; get it anew")
                yield file.read(length)
                file.seek(4, os.SEEK_CUR)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def is_tfds(root: Path) -> bool:
    """Return whether a folder is a version of a TFDS data set."""
    return (root / "dataset_info.json").is_file() and (root / "features.json").is_file()


def plan(root: Path) -> tuple[str, list[str], dict[str, list[RecordShard]]]:
    """Return a name, the classes and, for each split, the shards; raise UserError."""
    import tensorflow_datasets as tfds

    from deit_jax.data.sources.tfds import image_and_label

    try:
        info = tfds.builder_from_directory(str(root)).info
    except Exception as error:  # of many kinds, by what is damaged
        raise UserError(
            f"{root}: not as TFDS writes it ({' '.join(str(error).split())})"
        ) from error
    written = info.file_format.value if info.file_format else "none"
    if written != "tfrecord":
        hint = "; train on it as it is" if written == "array_record" else ""
        raise UserError(f"{root}: TFDS files in {written}; only tfrecord is converted{hint}")
    keys = image_and_label(info, str(root))
    splits = {split: _shards(root, part, keys) for split, part in info.splits.items()}
    name = "_".join(filter(None, (info.name, info.config_name)))
    return name, list(info.features[keys[1]].names), splits


def _shards(root: Path, split: Any, keys: tuple[str, str]) -> list[RecordShard]:
    shards = []
    for path, rows in zip(split.filepaths, split.shard_lengths, strict=True):
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        shards.append(RecordShard(str(path), str(root), rows, size, keys))
    return shards
