"""Safetensors files with timm's names, whose metadata describes the model to us."""

import json
from pathlib import PurePath
from typing import Any

import numpy as np
from safetensors.numpy import save

from deit_jax.storage import backend
from deit_jax.weights.fit import LoadedWeights, architecture, default_classes
from deit_jax.weights.metadata import METADATA
from deit_jax.weights.torch_names import to_torch


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
    metadata = {"format": "pt", METADATA: json.dumps(described)}
    write_safetensors(to_torch(opened.variables), path, metadata)


def write_safetensors(
    flat: dict[str, np.ndarray], path: PurePath, metadata: dict[str, str]
) -> None:
    # Not safetensors' save_file: what it writes nobody but the owner may read, whatever the umask.
    backend(path).write(path, save(flat, metadata=metadata))


# Our fields that have another name among the arguments of timm's VisionTransformer.
_TIMM = {
    **{"image_size": "img_size", "width": "embed_dim", "layer_scale": "init_values"},
    "in_channels": "in_chans",
}


def call(opened: LoadedWeights, path: PurePath) -> str | None:
    """Return the Python call that gives timm's model with the file's weights.

    None where create_model has no such arguments: a convnet of other shapes than its name's.
    """
    name, fields = opened.name, architecture(opened.model, opened.name)
    if not hasattr(opened.model, "grid_size"):
        if fields.keys() - {"in_channels"}:
            return None
        name = f"tf_{name}" if name.startswith("efficientnet_lite") else name
    elif not {"dist_head", "class_position", "distilled"}.isdisjoint(fields):
        return None
    arguments = {"num_classes": len(opened.classes)}
    arguments |= {_TIMM.get(key, key): fields[key] for key in sorted(fields)}
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({name!r}, checkpoint_path={str(path)!r}, {given})"
