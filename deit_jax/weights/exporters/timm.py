"""Safetensors files with timm's names, whose metadata describes the model to us."""

import json
from pathlib import PurePath
from typing import Any

import numpy as np
from safetensors.numpy import save

from deit_jax.data.decode import PLAIN
from deit_jax.storage import backend
from deit_jax.weights.fit import LoadedWeights, architecture, default_classes
from deit_jax.weights.metadata import METADATA, READING
from deit_jax.weights.timm_config import TIMM_FIELDS
from deit_jax.weights.torch_names import to_torch

# Names that timm does not have, and the same model of another image size, which it has.
_OTHER_SIZE = {"deit3_medium_patch16_384": "deit3_medium_patch16_224"}


def write(opened: LoadedWeights, path: PurePath) -> None:
    """Write a safetensors file with timm's names; its metadata describes the model to us."""
    described: dict[str, Any] = {
        "name": opened.name,
        "overrides": architecture(opened.model, opened.name),
        "image_size": opened.image_size,
        "mean": opened.mean,
        "std": opened.std,
        "crop_ratio": opened.crop_ratio,
    }
    described = {key: value for key, value in described.items() if value != ()}  # not known
    if opened.classes != default_classes(len(opened.classes)):
        described["classes"] = opened.classes
    if opened.multi_label:
        described["multi_label"] = True
    if unusual := {k: v for k, v in how_read(opened).items() if v != getattr(PLAIN, k)}:
        described["reading"] = unusual
    metadata = {"format": "pt", METADATA: json.dumps(described)}
    write_safetensors(to_torch(opened.variables), path, metadata)


def how_read(opened: LoadedWeights) -> dict[str, Any]:
    """Return what of the way in which images are read a file of weights tells."""
    return {key: getattr(opened.reading, key) for key in READING}


def write_safetensors(
    flat: dict[str, np.ndarray], path: PurePath, metadata: dict[str, str]
) -> None:
    # Not safetensors' save_file: what it writes nobody but the owner may read, whatever the umask.
    backend(path).write(path, save(flat, metadata=metadata))


def call(opened: LoadedWeights, path: PurePath) -> str | None:
    """Return the Python call that gives timm's model with the file's weights.

    None where create_model has no such arguments: a convnet of other shapes than its name's.
    """
    called = as_called(opened)
    if called is None:
        return None
    name, arguments = called
    arguments = {"num_classes": len(opened.classes)} | arguments
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({name!r}, checkpoint_path={str(path)!r}, {given})"


def as_called(opened: LoadedWeights) -> tuple[str, dict[str, Any]] | None:
    """Return timm's name of a model and what create_model must be told besides its classes.

    None where it has no such model.
    """
    name = _OTHER_SIZE.get(opened.name, opened.name)
    fields = architecture(opened.model, name)
    if not hasattr(opened.model, "grid_size"):
        if fields.keys() - {"in_channels"}:
            return None
        name = f"tf_{name}" if name.startswith("efficientnet_lite") else name
    elif not {"dist_head", "class_position", "distilled"}.isdisjoint(fields):
        return None
    return name, {TIMM_FIELDS.get(key, key): fields[key] for key in sorted(fields)}
