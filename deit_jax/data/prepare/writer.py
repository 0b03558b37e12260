"""Write one ArrayRecord file of a TFDS data set, without TensorFlow."""

import dataclasses
import hashlib
import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from deit_jax.data.depth import is_deep
from deit_jax.errors import UserError

# JPEG and PNG do not compress further; trying made writing five times slower, reading a fifth.
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to write: everything that a process needs to know."""

    shard: Any
    path: Path
    num_classes: int
    encoding: str | None
    max_side: int
    skip_unreadable: bool
    sha256: str | None  # of an earlier attempt, which is kept if the file still has it


def write_shard(job: Job) -> dict[str, Any]:
    """Write one shard, or find it written; return its line of the journal.

    {"file", "examples", "bytes", "sha256", "skipped": [name, …]}; {"kept": True} if it was there.
    """
    if job.sha256 and job.path.exists() and file_sha256(job.path) == job.sha256:
        return {"file": job.path.name, "kept": True}
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    features = make_features([str(i) for i in range(job.num_classes)], job.encoding)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    temporary = job.path.with_name(job.path.name + ".tmp")
    examples, size, skipped = 0, 0, []
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for example in job.shard.read():
            try:
                image = fit(example.image, job.max_side)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                if not job.skip_unreadable:
                    raise UserError(
                        f"{example.name}: not a readable image ({error}); repair or remove it, or "
                        "leave such images out with --skip-unreadable"
                    ) from error
                skipped.append(example.name)
                continue
            values = {"image": image, "label": example.label, "file_name": example.name}
            # What features.serialize_example does, with the fields always in the same order.
            record = serializer.get_tf_example(features.encode_example(values))
            record = record.SerializeToString(deterministic=True)
            writer.write(record)
            examples, size = examples + 1, size + len(record)
        writer.close()
        _check_written(temporary, examples)
        digest = file_sha256(temporary)
        os.replace(temporary, job.path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{job.path}: cannot be written ({_first_line(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)
    line = {"file": job.path.name, "examples": examples, "bytes": size, "sha256": digest}
    return {**line, "skipped": skipped}


def _check_written(path: Path, examples: int) -> None:
    """Read the number of records back: a full disk does not make the writer fail."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    found = reader.num_records()
    reader.close()
    if found != examples:
        raise OSError(f"{found} of {examples} examples arrived; is the disk full?")


def _first_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return next(iter(text.splitlines()), type(error).__name__)


def file_sha256(path: Path) -> str:
    """Return the checksum of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_features(classes: list[str], encoding: str | None):
    """Return the TFDS features of a data set, those that TFDS's imagenet2012 has."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format=encoding),
            "label": tfds.features.ClassLabel(names=classes),
            "file_name": tfds.features.Text(),
        }
    )


def fit(data: bytes, max_side: int) -> bytes:
    """Return an image's own bytes; where a side is longer than `max_side` > 0, smaller ones.

    Smaller ones are JPEG of quality 95, scaled bicubically with antialias; more than 8 bits a
    colour are kept, as a run's config decides how they are read. Raise OSError, ValueError or
    SyntaxError if the image's header cannot be read.
    """
    with Image.open(io.BytesIO(data)) as file:
        image: Image.Image = file
        if not max_side or max(image.size) <= max_side or is_deep(image):
            return data
        kept = {k: image.info[k] for k in ("exif", "icc_profile") if image.info.get(k)}
        if image.mode != "L":
            if image.mode == "CMYK":
                kept.pop("icc_profile", None)  # describes inks
            image = image.convert("RGBA") if image.mode == "P" else image
            image = image.convert("RGB")
        scale = max_side / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        small = io.BytesIO()
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        resized.save(small, "jpeg", quality=95, optimize=True, **kept)
        return small.getvalue()
