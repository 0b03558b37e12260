"""What weight files and folders say about the model that they belong to.

A Hugging Face or timm folder says it in config.json, a safetensors file of ours in its metadata; a
.pth says nothing.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deit_jax.models import registry

METADATA = "deit_jax"  # the key under which a safetensors file of ours describes its model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claims:
    """What a source says about itself, as far as it says anything."""

    format: str
    name: str | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: list[str] | None = None
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_ratio: float | None = None
    notes: tuple[str, ...] = ()


def read_claims(path: Path) -> Claims:
    """Return what a file or folder says about itself; raise ValueError for what it should not."""
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text())
        if "model_type" in config:
            return _hugging_face_claims(path, config)
        if "architecture" in config:
            return _timm_claims(config)
    if path.is_dir():
        return Claims(format="folder")
    try:
        with safe_open(path, framework="numpy") as file:
            described = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except SafetensorError:
        return Claims(format="PyTorch file")
    overrides = described.get("overrides", {})
    overrides |= {k: tuple(v) for k, v in overrides.items() if isinstance(v, list)}
    described |= {k: tuple(described[k]) for k in ("mean", "std") if k in described}
    return Claims(format="safetensors file", **described)


def _hugging_face_claims(folder: Path, config: dict[str, Any]) -> Claims:
    """Read the two JSON files; fields that config.json leaves out have transformers' defaults."""
    if config["model_type"] not in ("deit", "vit"):
        raise ValueError(f"model_type {config['model_type']!r} in config.json is not deit or vit")
    for key, value in {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}={config[key]!r} in config.json; deit_jax has only {value!r}")
    fields = {
        "width": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "patch_size": config.get("patch_size", 16),
        "image_size": config.get("image_size", 224),
    }
    epsilon = config.get("layer_norm_eps", 1e-12)
    if epsilon > 1e-5:
        raise ValueError(f"layer_norm_eps={epsilon} in config.json; deit_jax has only 1e-6")
    # transformers' copies of DeiT say 1e-12, but the weights were trained with 1e-6.
    note = f"layer_norm_eps is 1e-6 here, {epsilon:g} in config.json"
    mlp_ratio = config.get("intermediate_size", 3072) / fields["width"]
    distilled = config["model_type"] == "deit"
    names = registry.list_models("deit_*_distilled_*" if distilled else "deit_*_patch*")
    specs = {
        n: s.kwargs for n in names if (s := registry.SPECS[n]).kwargs["distilled"] == distilled
    }
    name = max(specs, key=lambda n: sum(specs[n][k] == v for k, v in fields.items()))
    labels = config.get("id2label") or {}
    classes = [str(labels[str(i)]) for i in range(len(labels)) if str(i) in labels]
    if any(text.startswith("LABEL_") for text in classes):  # transformers' own placeholders
        classes = []
    preprocessor = folder / "preprocessor_config.json"
    inputs = json.loads(preprocessor.read_text()) if preprocessor.is_file() else {}
    return Claims(
        format="Hugging Face folder",
        name=name,
        overrides=fields | {"mlp_ratio": mlp_ratio},
        classes=classes or None,
        mean=tuple(inputs["image_mean"]) if "image_mean" in inputs else None,
        std=tuple(inputs["image_std"]) if "image_std" in inputs else None,
        crop_ratio=_crop_ratio(inputs),
        notes=() if epsilon == 1e-6 else (note,),
    )


def _crop_ratio(inputs: dict[str, Any]) -> float | None:
    """Return the side of the crop by that of the resized image, in a preprocessor_config.json."""

    def side(key):
        value = inputs.get(key)
        return min(value.values(), default=None) if isinstance(value, dict) else value

    if side("size") is None:
        return None
    return side("crop_size") / side("size") if inputs.get("do_center_crop") else 1.0


def _timm_claims(config: dict[str, Any]) -> Claims:
    inputs = config.get("pretrained_cfg", {})
    return Claims(
        format="timm folder",
        name=config["architecture"].partition(".")[0].removeprefix("tf_"),
        classes=config.get("label_names"),
        image_size=inputs["input_size"][-1] if "input_size" in inputs else None,
        mean=tuple(inputs["mean"]) if "mean" in inputs else None,
        std=tuple(inputs["std"]) if "std" in inputs else None,
        crop_ratio=inputs.get("crop_pct"),
    )
