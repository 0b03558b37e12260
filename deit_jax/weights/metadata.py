"""Metadata of weight files and folders: what they say about the model that they belong to.

A Hugging Face or timm folder says it in config.json, a safetensors file of ours in its metadata; a
.pth says nothing.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deit_jax.models import limits, registry
from deit_jax.shapes import Size, simplest

METADATA = "deit_jax"  # the key under which a safetensors file of ours describes its model
# What a source that contradicts itself can make the code that believes it raise.
DISBELIEF = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a source says about itself, as far as it says anything."""

    format: str
    name: str | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: list[str] | None = None
    image_size: Size | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_ratio: float | None = None
    multi_label: bool | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        name, classes = self.name, self.classes
        _must(name is None or isinstance(name, str), "name", name, "a string")
        _must(_names(self.overrides), "overrides", self.overrides, "fields of the model")
        _must(classes is None or _names(classes), "classes", classes, "a list of names")
        several = self.multi_label
        _must(several is None or isinstance(several, bool), "multi_label", several, "true or false")
        for key, low in (("mean", -math.inf), ("std", 0.0)):
            value = getattr(self, key)
            fine = isinstance(value, tuple) and len(value) > 0
            fine = fine and all(_is_number(x) and x > low for x in value)
            _must(value is None or fine, key, value, "numbers, one per channel")
        if self.image_size is not None:
            limits.check_sides(self.image_size)
        ratio = self.crop_ratio
        fine = ratio is None or (_is_number(ratio) and 0.1 <= ratio <= 2)
        _must(fine, "crop_ratio", ratio, "a number between 0.1 and 2")


def in_one_line(error: Exception) -> str:
    """Return what an error says first, with its type unless the message is one of ours."""
    text = next(iter(str(error).splitlines()), "")
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _must(fine: bool, key: str, value: Any, what: str) -> None:
    if not fine:
        raise ValueError(f"{key}={str(value)[:60]} in what it says of itself: must be {what}")


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _names(values: Any) -> bool:
    return isinstance(values, list | dict) and all(isinstance(value, str) for value in values)


def _read_object(text: str, where: str) -> dict[str, Any]:
    """Return the object in a JSON text; raise ValueError if it holds anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}, not an object of fields")
    return value


def _tuple(value: Any) -> Any:
    """Return a list as a tuple; what is none is for Claims to refuse."""
    return tuple(value) if isinstance(value, list) else value


def read_metadata(path: Path) -> Metadata:
    """Return what a file or folder says about itself; raise ValueError for what it should not."""
    if (path / "config.json").is_file():
        config = _read_object((path / "config.json").read_text(), "config.json")
        if "model_type" in config:
            return _hugging_face_metadata(path, config)
        if "architecture" in config:
            return _timm_metadata(config)
    if path.is_dir():
        return Metadata(format="folder")
    try:
        with safe_open(path, framework="numpy") as file:
            described = (file.metadata() or {}).get(METADATA, "{}")
    except SafetensorError:
        return Metadata(format="PyTorch file")
    described = _read_object(described, f"the metadata {METADATA!r}")
    known = {"name", "overrides", "classes", "image_size", "mean", "std", "crop_ratio"}
    unknown = sorted(described.keys() - known - {"multi_label"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r:.60} in the metadata {METADATA!r}")
    if isinstance(described.get("overrides"), dict):
        described["overrides"] = {k: _tuple(v) for k, v in described["overrides"].items()}
    described |= {k: _tuple(described[k]) for k in ("mean", "std", "image_size") if k in described}
    return Metadata(format="safetensors file", **described)


def _hugging_face_metadata(folder: Path, described: dict[str, Any]) -> Metadata:
    """Read the two JSON files; fields that config.json leaves out have transformers' defaults."""
    if described["model_type"] not in ("deit", "vit"):
        raise ValueError(
            f"model_type {described['model_type']!r} in config.json is not deit or vit; "
            "`deit convert … --to=teacher` makes a teacher of it"
        )
    for key, value in {"hidden_act": "gelu", "qkv_bias": True}.items():
        if described.get(key, value) != value:
            raise ValueError(
                f"{key}={described[key]!r} in config.json; deit_jax has only {value!r}"
            )
    fields = {
        "width": described.get("hidden_size", 768),
        "depth": described.get("num_hidden_layers", 12),
        "num_heads": described.get("num_attention_heads", 12),
        "patch_size": described.get("patch_size", 16),
        "image_size": described.get("image_size", 224),
    }
    fields["image_size"] = size = _tuple(fields["image_size"])
    limits.check_sides(size)
    for key, value in fields.items():
        if key != "image_size":
            limits.check_whole(key, value, limits.WIDTH)
    fields["image_size"] = simplest(size)
    channels = described.get("num_channels", 3)
    limits.check_whole("num_channels", channels, limits.CHANNELS)
    epsilon = described.get("layer_norm_eps", 1e-12)
    _must(_is_number(epsilon), "layer_norm_eps", epsilon, "a number")
    if epsilon > 1e-5:
        raise ValueError(f"layer_norm_eps={epsilon} in config.json; deit_jax has only 1e-6")
    # transformers' copies of DeiT say 1e-12, but the weights were trained with 1e-6.
    note = f"layer_norm_eps is 1e-6 here, {epsilon:g} in config.json"
    hidden = described.get("intermediate_size", 3072)
    limits.check_whole("intermediate_size", hidden, 64 * limits.WIDTH)
    mlp_ratio = hidden / fields["width"]
    distilled = described["model_type"] == "deit"
    names = registry.list_models("deit_*_distilled_*" if distilled else "deit_*_patch*")
    specs = {
        n: s.kwargs for n in names if (s := registry.specs()[n]).kwargs["distilled"] == distilled
    }
    name = max(specs, key=lambda n: sum(specs[n][k] == v for k, v in fields.items()))
    labels = described.get("id2label") or {}
    _must(isinstance(labels, dict), "id2label", labels, "an object of names")
    classes = [str(labels[str(i)]) for i in range(len(labels)) if str(i) in labels]
    if any(text.startswith("LABEL_") for text in classes):  # transformers' own placeholders
        classes = []
    inputs = _preprocessor(folder)
    return Metadata(
        format="Hugging Face folder",
        name=name,
        overrides=fields | {"mlp_ratio": mlp_ratio, "in_channels": channels},
        classes=classes or None,
        mean=_tuple(inputs.get("image_mean")),
        std=_tuple(inputs.get("image_std")),
        crop_ratio=_crop_ratio(inputs),
        multi_label=_PROBLEMS.get(str(described.get("problem_type"))),
        notes=() if epsilon == 1e-6 else (note,),
    )


# transformers' words for how labels are meant.
_PROBLEMS = {"multi_label_classification": True, "single_label_classification": False}


def _preprocessor(folder: Path) -> dict[str, Any]:
    """Return what a folder says of how its images are made, {} where it says nothing."""
    file = folder / "preprocessor_config.json"
    return _read_object(file.read_text(), file.name) if file.is_file() else {}


def _crop_ratio(inputs: dict[str, Any]) -> float | None:
    """Return the side of the crop by that of the resized image, in a preprocessor_config.json."""

    def side(key):
        value = inputs.get(key)
        sides = value.values() if isinstance(value, dict) else [value]
        _must(all(n is None or (_is_number(n) and n > 0) for n in sides), key, value, "a size")
        return min(sides, default=None)

    size, crop = side("size"), side("crop_size")
    if size is None or not inputs.get("do_center_crop"):
        return None if size is None else 1.0
    _must(crop is not None, "crop_size", crop, "a size")
    return crop / size


def _timm_metadata(described: dict[str, Any]) -> Metadata:
    inputs, size = described.get("pretrained_cfg", {}), None
    _must(isinstance(inputs, dict), "pretrained_cfg", inputs, "an object of fields")
    architecture = described["architecture"]
    _must(isinstance(architecture, str), "architecture", architecture, "a string")
    if "input_size" in inputs:
        size = inputs["input_size"]
        _must(isinstance(size, list) and len(size) == 3, "input_size", size, "three numbers")
    return Metadata(
        format="timm folder",
        name=architecture.partition(".")[0].removeprefix("tf_"),
        classes=described.get("label_names"),
        image_size=size and simplest((size[1], size[2])),
        mean=_tuple(inputs.get("mean")),
        std=_tuple(inputs.get("std")),
        crop_ratio=inputs.get("crop_pct"),
    )
