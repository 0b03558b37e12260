"""Folders for timm's `local-dir:` and `hf-hub:`: weights, and all that timm keeps of a model."""

from pathlib import PurePath
from typing import Any

from deit_jax.models.registry import family_of
from deit_jax.shapes import sides
from deit_jax.storage import backend, write_json
from deit_jax.weights.exporters import timm
from deit_jax.weights.fit import LoadedWeights, default_classes
from deit_jax.weights.timm_config import CROP_MODES


def call(opened: LoadedWeights, folder: PurePath) -> str:
    """Return the Python call that gives timm's model with the folder's weights."""
    return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"


def write(opened: LoadedWeights, folder: PurePath) -> None:
    """Write model.safetensors and timm's config.json, which transformers' TimmWrapper reads too."""
    config = timm_config(opened)
    backend(folder).make_folder(folder)
    timm.write(opened, folder / "model.safetensors")
    write_json(folder / "config.json", config)


def timm_config(opened: LoadedWeights) -> dict[str, Any]:
    """Return what timm's `save_for_hf` writes of a model; raise ValueError if timm has no such."""
    called = timm.as_called(opened)
    if called is None:
        raise ValueError(f"timm has no {opened.name} of these shapes; write --to=deit_jax")
    opened.check_convention()
    name, arguments = called
    classes = opened.classes
    named = classes != default_classes(len(classes))
    several = {"problem_type": "multi_label_classification"} if opened.multi_label else {}
    return {
        "architecture": name,
        "num_classes": len(classes),
        **({"label_names": list(classes)} if named else {}),
        **({"model_args": arguments} if arguments else {}),
        **several,
        "pretrained_cfg": _pretrained_cfg(opened),
    }


def _pretrained_cfg(opened: LoadedWeights) -> dict[str, Any]:
    family, channels = family_of(opened.model), opened.reading.channels
    heads = [head.replace("/", ".") for head in family.heads]
    if not (getattr(opened.model, "distilled", False) and opened.model.dist_head):
        heads = heads[:1]
    mode = {ours: theirs for theirs, ours in CROP_MODES.items()}[opened.reading.resize]
    return {
        "num_classes": len(opened.classes),
        "input_size": [channels, *sides(opened.image_size)],
        "fixed_input_size": hasattr(opened.model, "grid_size"),
        "interpolation": "bicubic",
        "crop_pct": opened.crop_ratio if mode == "center" else 1.0,
        "crop_mode": mode,
        "mean": list(opened.mean),
        "std": list(opened.std),
        "first_conv": family.stem.replace("/", "."),
        "classifier": heads[0] if len(heads) == 1 else heads,
    }
