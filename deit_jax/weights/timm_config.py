"""What the config.json of a timm folder says of its model, in the words of Metadata."""

from typing import Any

from deit_jax.models import registry
from deit_jax.shapes import simplest
from deit_jax.weights.claims import are_names, as_tuple, must

CROP_MODES = {"center": "crop", "squash": "squash", "border": "pad"}  # timm's, and ours
# Our fields that have another name among the arguments of timm's VisionTransformer.
TIMM_FIELDS = {
    **{"image_size": "img_size", "width": "embed_dim", "layer_scale": "init_values"},
    "in_channels": "in_chans",
}
_SAME_NAME = ("depth", "num_heads", "patch_size", "mlp_ratio")
# Others of timm's that change no answer.
_HARMLESS = {
    *("num_classes", "drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate"),
    *("attn_drop_rate", "pos_drop_rate", "patch_drop_rate", "dynamic_img_size"),
    *("dynamic_img_pad", "strict_img_size", "weight_init", "fix_init", "zero_init_last"),
    *("pretrained", "pretrained_strict", "bn_momentum"),
}
# And those that are harmless where they say what the models here do; null is timm's default.
_TRANSFORMERS_DO: dict[str, tuple[Any, ...]] = {
    **{"global_pool": ("token",), "class_token": (True,), "pos_embed": ("learn",)},
    **{"qkv_bias": (True,), "proj_bias": (True,), "final_norm": (True,)},
    **{"qk_norm": (False,), "scale_attn_norm": (False,), "scale_mlp_norm": (False,)},
    **{"pre_norm": (False,), "reg_tokens": (0,), "fc_norm": (False, None)},
    **{"pool_include_prefix": (False,), "embed_norm_layer": (None,)},
    **{"norm_layer": ("layernorm", None), "act_layer": ("gelu", None)},
}
_CONVNETS_DO: dict[str, tuple[Any, ...]] = {
    **{"global_pool": ("avg",), "output_stride": (32,)},
    **{"norm_layer": (None,), "act_layer": (None,)},
}


def of_timm(described: dict[str, Any], problems: dict[str, bool]) -> dict[str, Any]:
    """Return the fields of Metadata; raise ValueError for what no model here does.

    `problems` is what the words of `problem_type` mean.
    """
    # Old folders have no pretrained_cfg: its fields stand in config.json itself, names as `labels`.
    inputs, size = described.get("pretrained_cfg", described), None
    must(isinstance(inputs, dict), "pretrained_cfg", inputs, "an object of fields")
    architecture = described["architecture"]
    must(isinstance(architecture, str), "architecture", architecture, "a string")
    if "input_size" in inputs:
        size = inputs["input_size"]
        must(isinstance(size, list) and len(size) == 3, "input_size", size, "three numbers")
    reading, notes = _reading(inputs)
    name = _name(architecture)
    called = described.get("label_names") or inputs.get("label_names")
    if inputs is described:
        called = described.get("labels") or called
    return {
        "name": name,
        "overrides": _fields(described.get("model_args", {}), name),
        "classes": _class_names(called),
        "image_size": size and simplest((size[1], size[2])),
        "mean": as_tuple(inputs.get("mean")),
        "std": as_tuple(inputs.get("std")),
        "crop_ratio": inputs.get("crop_pct"),
        "multi_label": problems.get(str(described.get("problem_type"))),
        "reading": reading,
        "notes": notes,
    }


def _name(architecture: str) -> str:
    name = architecture.partition(".")[0]
    if name.startswith("efficientnet_lite"):
        raise ValueError(
            f"architecture {name} in config.json pads images as PyTorch does; the models here as "
            f"tf_{name}, with which it would have other answers"
        )
    return name.removeprefix("tf_")


def _fields(arguments: Any, name: str) -> dict[str, Any]:
    """Return create_model's overrides in timm's model_args; raise ValueError for what is none."""
    fine = isinstance(arguments, dict) and are_names(arguments)
    must(fine, "model_args", arguments, "an object")
    spec = registry.specs().get(name)
    of_transformer = spec is None or "patch_size" in spec.kwargs
    same = _TRANSFORMERS_DO if of_transformer else _CONVNETS_DO
    ours = {theirs: field for field, theirs in TIMM_FIELDS.items()}
    ours |= {key: key for key in _SAME_NAME}
    fields = {}
    for key, value in arguments.items():
        if key in _HARMLESS:
            continue
        if key == "no_embed_class" and of_transformer:
            must(isinstance(value, bool), f"model_args.{key}", value, "true or false")
            fields["class_position"] = not value
        elif key in ours and (of_transformer or key == "in_chans"):
            if value is not None or key == "init_values":  # null: no layer scale
                fields[ours[key]] = _simplest(as_tuple(value))
        elif key not in same:
            raise ValueError(f"model_args.{key} in config.json is not known to deit_jax")
        elif not any(value is x or (value == x and type(value) is type(x)) for x in same[key]):
            raise ValueError(
                f"model_args.{key}={str(value)[:60]} in config.json; deit_jax has only "
                f"{same[key][0]}"
            )
    return fields


def _simplest(value: Any) -> Any:
    """Return the side alone of a pair of equal ones."""
    return value[0] if isinstance(value, tuple) and value == value[:1] * 2 else value


def _class_names(label_names: Any) -> list[str] | None:
    """Return timm's label_names as a list, from one or from an object by number."""
    if isinstance(label_names, dict):
        numbers = [str(i) for i in range(len(label_names))]
        fine = sorted(label_names) == sorted(numbers)
        must(fine, "label_names", label_names, "a name for each class")
        return [label_names[i] for i in numbers]
    return label_names


def _reading(inputs: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return how timm's config has images read, and notes on what is done otherwise here."""
    notes, mode = [], inputs.get("crop_mode") or "center"
    if (way := inputs.get("interpolation")) not in (None, "bicubic", "random"):
        notes.append(f"interpolation {way} in config.json; images are resized bicubic here")
    must(mode in CROP_MODES, "crop_mode", mode, f"one of {', '.join(CROP_MODES)}")
    if mode != "center" and inputs.get("crop_pct", 1) != 1:
        notes.append(
            f"crop_mode {mode} with crop_pct {inputs['crop_pct']} in config.json; here images are "
            "cropped from the centre"
        )
        mode = "center"
    return ({} if mode == "center" else {"resize": CROP_MODES[mode]}), tuple(notes)
