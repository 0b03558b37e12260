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

from deit_jax.data.decode import PLAIN, Reading
from deit_jax.models import limits, registry
from deit_jax.shapes import Size, per_channel, simplest
from deit_jax.weights.claims import are_names, as_tuple, is_number, must
from deit_jax.weights.processors import of_processor
from deit_jax.weights.timm_config import CROP_MODES, of_timm

METADATA = "deit_jax"  # the key under which a safetensors file of ours describes its model
READING = ("resize", "exif", "bits")  # fields of data that it tells
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
    reading: dict[str, Any] = dataclasses.field(default_factory=dict)  # of READING
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        name, classes = self.name, self.classes
        must(name is None or isinstance(name, str), "name", name, "a string")
        must(are_names(self.overrides), "overrides", self.overrides, "fields of the model")
        must(classes is None or are_names(classes), "classes", classes, "a list of names")
        several = self.multi_label
        must(several is None or isinstance(several, bool), "multi_label", several, "true or false")
        for key, low in (("mean", -math.inf), ("std", 0.0)):
            value = getattr(self, key)
            fine = isinstance(value, tuple) and len(value) > 0
            fine = fine and all(is_number(x) and x > low for x in value)
            must(value is None or fine, key, value, "numbers, one per channel")
        if self.image_size is not None:
            limits.check_sides(self.image_size)
        self._check_reading()
        ratio = self.crop_ratio
        fine = ratio is None or (is_number(ratio) and 0.1 <= ratio <= 2)
        must(fine, "crop_ratio", ratio, "a number between 0.1 and 2")

    def _check_reading(self) -> None:
        reading = self.reading
        known = isinstance(reading, dict) and {*READING} >= reading.keys()
        must(known, "reading", reading, f"an object of {', '.join(READING)}")
        resize, exif, bits = (reading.get(k, getattr(PLAIN, k)) for k in READING)
        must(resize in CROP_MODES.values(), "resize", resize, "crop, squash or pad")
        must(isinstance(exif, bool), "exif", exif, "true or false")
        whole = isinstance(bits, int) and not isinstance(bits, bool) and 0 <= bits <= 32
        must(whole, "bits", bits, "a number of bits")

    def read_as(self, channels: int, mean: tuple[float, ...]) -> Reading:
        """Return how images are read for the weights; padding has their mean colour."""
        fill = tuple(round(255 * x) for x in per_channel(mean, channels)) if mean else ()
        fill = (
            fill
            if self.reading.get("resize") == "pad" and len(fill) == channels
            else (0,) * channels
        )
        return dataclasses.replace(PLAIN, channels=channels, fill=fill, **self.reading)


def in_one_line(error: Exception) -> str:
    """Return what an error says first, with its type unless the message is one of ours."""
    text = next(iter(str(error).splitlines()), "")
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _read_object(text: str, where: str) -> dict[str, Any]:
    """Return the object in a JSON text; raise ValueError if it holds anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}, not an object of fields")
    return value


def read_metadata(path: Path) -> Metadata:
    """Return what a file or folder says about itself; raise ValueError for what it should not."""
    if (path / "config.json").is_file():
        config = _read_object((path / "config.json").read_text(), "config.json")
        if "model_type" in config:
            return _hugging_face_metadata(path, config)
        if "architecture" in config:
            return Metadata(format="timm folder", **of_timm(config, _PROBLEMS))
    if path.is_dir():
        return Metadata(format="folder")
    try:
        with safe_open(path, framework="numpy") as file:
            described = (file.metadata() or {}).get(METADATA, "{}")
    except SafetensorError:
        return Metadata(format="PyTorch file")
    described = _read_object(described, f"the metadata {METADATA!r}")
    known = {"name", "overrides", "classes", "image_size", "mean", "std", "crop_ratio"}
    unknown = sorted(described.keys() - known - {"multi_label", "reading"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r:.60} in the metadata {METADATA!r}")
    if isinstance(described.get("overrides"), dict):
        described["overrides"] = {k: as_tuple(v) for k, v in described["overrides"].items()}
    described |= {
        k: as_tuple(described[k]) for k in ("mean", "std", "image_size") if k in described
    }
    return Metadata(format="safetensors file", **described)


def _hugging_face_metadata(folder: Path, described: dict[str, Any]) -> Metadata:
    """Read the two JSON files; fields that config.json leaves out have transformers' defaults."""
    kind = described["model_type"]
    if kind not in ("deit", "vit") and not _is_deit3(described):
        raise ValueError(
            f"model_type {kind!r} in config.json is not deit or vit, nor a DeiT III as a beit; "
            "`deit convert … --to=teacher` makes a teacher of it"
        )
    fields = _hugging_face_fields(described)
    channels = described.get("num_channels", 3)
    limits.check_whole("num_channels", channels, limits.CHANNELS)
    epsilon = described.get("layer_norm_eps", 1e-12)
    must(is_number(epsilon), "layer_norm_eps", epsilon, "a number")
    if epsilon > 1e-5:
        raise ValueError(f"layer_norm_eps={epsilon} in config.json; deit_jax has only 1e-6")
    # transformers' copies of DeiT say 1e-12, but the weights were trained with 1e-6.
    note = f"layer_norm_eps is 1e-6 here, {epsilon:g} in config.json"
    hidden = described.get("intermediate_size", 3072)
    limits.check_whole("intermediate_size", hidden, 64 * limits.WIDTH)
    mlp_ratio = hidden / fields["width"]
    distilled = kind == "deit"
    pattern = {"deit": "deit_*_distilled_*", "beit": "deit3_*"}.get(kind, "deit_*_patch*")
    names, all_specs = registry.list_models(pattern), registry.specs()
    specs = {n: all_specs[n].kwargs for n in names}
    specs = {n: s for n, s in specs.items() if s.get("distilled", False) == distilled}
    name = max(specs, key=lambda n: sum(specs[n][k] == v for k, v in fields.items()))
    labels = described.get("id2label") or {}
    must(isinstance(labels, dict), "id2label", labels, "an object of names")
    classes = [str(labels[str(i)]) for i in range(len(labels)) if str(i) in labels]
    if any(text.startswith("LABEL_") for text in classes):  # transformers' own placeholders
        classes = []
    inputs = _preprocessor(folder, kind, name)
    inputs["notes"] = (*(() if epsilon == 1e-6 else (note,)), *inputs["notes"])
    return Metadata(
        format="Hugging Face folder",
        name=name,
        overrides=fields | {"mlp_ratio": mlp_ratio, "in_channels": channels},
        classes=classes or None,
        multi_label=_PROBLEMS.get(str(described.get("problem_type"))),
        **inputs,
    )


def _hugging_face_fields(described: dict[str, Any]) -> dict[str, Any]:
    """Return the model's sizes by our names; raise ValueError for what no model here has."""
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
    fields["image_size"] = size = as_tuple(fields["image_size"])
    limits.check_sides(size)
    for key, value in fields.items():
        if key != "image_size":
            limits.check_whole(key, value, limits.WIDTH)
    fields["image_size"] = simplest(size)
    return fields


def _is_deit3(described: dict[str, Any]) -> bool:
    """Return whether a config.json is of a BEiT that computes what DeiT III does."""
    fields = {"use_absolute_position_embeddings": True, "use_mean_pooling": False}
    fields |= {"use_relative_position_bias": False, "use_shared_relative_position_bias": False}
    fields |= {"use_mask_token": False}
    return described["model_type"] == "beit" and all(
        described.get(key) is value for key, value in fields.items()
    )


# transformers' words for how labels are meant.
_PROBLEMS = {"multi_label_classification": True, "single_label_classification": False}


def _preprocessor(folder: Path, model_type: str, name: str) -> dict[str, Any]:
    """Return what a folder says of how its images are made; a note where it says nothing."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        return of_processor(_read_object(file.read_text(), file.name), model_type)
    spec = registry.get_spec(name)
    note = f"no {file.name}: mean {spec.mean} and std {spec.std} of images assumed"
    return {"notes": (note,)}
