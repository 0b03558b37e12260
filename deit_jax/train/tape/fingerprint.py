"""Fingerprint of a label tape: all that decides the views and the teacher's answers."""

import hashlib
from pathlib import PurePath
from typing import Any

import jax
import numpy as np

from deit_jax.config.serialize import flatten, meanings, to_json
from deit_jax.errors import UserError
from deit_jax.parallel.sharding import path_name
from deit_jax.shapes import Size
from deit_jax.step.committee import Committee
from deit_jax.step.teacher import Foreign
from deit_jax.train.experiment import Experiment
from deit_jax.workdir.held_out import label_bytes

# One more with every change that makes other views of the same fields: 2 draws mixup's lambda anew.
VIEWS = 2


# Of the teacher; all None where none is known.
TEACHER = tuple(f"teacher.{name}" for name in ("model", "sha256", "image_size", "mean", "std"))


def fingerprint(experiment: Experiment, dataset, teacher) -> dict[str, Any]:
    """Return all that decides views and answers: {field: value}, as JSON has it.

    `teacher` is what load_teacher returns, or the name of one in another program, of which nothing
    else is known; None without one: its fields are then None.
    """
    flat = flatten(to_json(experiment.config))
    names = [
        *("seed", "batch_size", "distill.kind", "data.source", "data.train_split", "data.balance"),
        *("data.rules", "data.multi_label", "data.labels", "data.classes", "data.image_column"),
        *("data.decoder", "data.mean", "data.std", "data.exif", "data.resize", "data.bits"),
        "data.channels",
        *(k for k in flat if k.startswith(("augment.", "mixing."))),
    ]
    labels = getattr(dataset.train, "labels", None)  # TFDS's are not known without reading all
    views = {name: flat[name] for name in names} | {
        "views": VIEWS,
        "data.images": len(dataset.train),
        "data.labels": None if labels is None else hashlib.sha256(label_bytes(labels)).hexdigest(),
        "data.num_classes": len(dataset.classes),
        "data.classes": _sha256(np.frombuffer("\n".join(dataset.classes).encode(), np.uint8)),
        "image_size": _json(experiment.image_size),
        "dtype": experiment.dtype.name,
    }
    known = dict.fromkeys(TEACHER)
    if isinstance(teacher, str):
        known["teacher.model"], views["dtype"] = teacher, None  # ours, in which it did not compute
    elif teacher is not None:
        known = _of_committee(*teacher) if isinstance(teacher[0], Committee) else _of(*teacher)
    return views | known


def _of(teacher, params) -> dict[str, Any]:
    """Return the fields of one teacher; those that only some have are left out of the others."""
    model, count = teacher.model, sum(x.size for x in jax.tree.leaves(params))
    foreign = isinstance(model, Foreign)
    name = model.name if foreign else type(model).__name__
    known = {
        "teacher.model": f"{name} of {count} parameters",
        "teacher.sha256": parameters_sha256(params),
        "teacher.image_size": _json(teacher.image_size),
        "teacher.mean": list(teacher.mean),
        "teacher.std": list(teacher.std),
    }
    if foreign and model.program:
        known["teacher.program"] = model.program
    if teacher.columns is not None:
        known["teacher.columns"] = _sha256(np.asarray(teacher.columns, np.int64))
    return known


def _of_committee(committee: Committee, params) -> dict[str, Any]:
    """Return the same fields of several, each a list, and how they answer together."""
    each = [_of(member, own) for member, own in zip(committee.members, params, strict=True)]
    names = dict.fromkeys(name for known in each for name in known)
    together = {"teacher.shares": list(committee.shares), "teacher.votes": committee.votes}
    return {name: [known.get(name) for known in each] for name in names} | together


def _json(size: Size | None) -> int | list[int] | None:
    return list(size) if isinstance(size, tuple) else size


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


def outsider(tapes: dict[str, Any]) -> str | None:
    """Return the name of the teacher of a tape that another program wrote, None of ours."""
    return tapes.get("teacher.model") if tapes.get("teacher.sha256") is None else None


def differences(tapes: dict[str, Any], own: dict[str, Any]) -> dict[str, str]:
    """Return {field: "a there, b here"} of all that differ."""
    tapes = aged(tapes, own)
    order = [*own, *sorted(tapes.keys() - own.keys())]
    other = [k for k in order if k not in own or tapes.get(k) != own[k]]
    return {k: f"{tapes.get(k)} there, {own.get(k)} here" for k in other}


def aged(tapes: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a fingerprint with the fields of another that it is too old to have.

    They mean what was done before there were such fields.
    """
    return {k: v for k, v in meanings().items() if k in other} | tapes


def listed(different: dict[str, str]) -> str:
    """Return differences on one line."""
    return "; ".join(f"{field}: {values}" for field, values in different.items())


def check_fingerprint(path: PurePath, tapes: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise UserError with every field that differs; a teacher that is not known differs not.

    Nor does the compute dtype from that of a teacher in another program, which is not known.
    """
    different = differences(tapes, own)
    name = outsider(tapes)
    if own.get("teacher.model") is None:
        free = ("dtype",) if name else ()
        different = {
            k: v for k, v in different.items() if not k.startswith("teacher.") and k not in free
        }
    elif name and own["teacher.sha256"]:
        raise UserError(
            f"{path}: another program wrote this label tape, of its teacher {name!r}, which no "
            "weights here can be compared with; leave config.teacher.weights out (`deit tape "
            "check` compares answers), or choose another config.teacher.tape_path"
        )
    if different:
        raise UserError(
            f"{path}: this label tape was recorded for other views or another teacher "
            f"({listed(different)}); restore these values, or record another tape at another "
            "config.teacher.tape_path"
        )
