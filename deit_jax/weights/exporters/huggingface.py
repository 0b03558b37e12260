"""Folders for Hugging Face's transformers."""

from pathlib import PurePath
from typing import Any

from deit_jax.shapes import Size, sides
from deit_jax.storage import backend, write_json
from deit_jax.weights.exporters.timm import write_safetensors
from deit_jax.weights.fit import LoadedWeights
from deit_jax.weights.torch_names import to_torch, with_class_position

_BICUBIC = 3  # Pillow's number


def call(opened: LoadedWeights, folder: PurePath) -> str:
    """Return the Python call that gives transformers' model with the folder's weights."""
    return f"transformers.{_hugging_face_class(opened.model)}.from_pretrained({str(folder)!r})"


def write(opened: LoadedWeights, folder: PurePath) -> None:
    """Write a folder for transformers: DeiT with teacher if distilled, otherwise ViT.

    DeiT III is a BEiT there: with layer scale, and absolute positions instead of relative ones.
    """
    model = opened.model
    if not hasattr(model, "grid_size") or (model.layer_scale is not None and model.distilled):
        raise ValueError(
            f"transformers has no {opened.name}, only DeiT, ViT and, for DeiT III, BEiT; "
            "--to=timm_folder writes what its TimmWrapper reads"
        )
    opened.check_convention()
    flat = to_torch(opened.variables, "huggingface")
    if not model.class_position:
        flat = with_class_position(flat, model.num_prefix_tokens)
    backend(folder).make_folder(folder)
    write_safetensors(flat, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", _hugging_face_config(opened))
    write_json(folder / "preprocessor_config.json", _preprocessor_config(opened))


def _hugging_face_class(model) -> str:
    if not model.distilled:
        kind = "ViT" if model.layer_scale is None else "Beit"
        return f"{kind}ForImageClassification"
    return f"DeiTForImageClassification{'WithTeacher' if model.dist_head else ''}"


def _model_type(model) -> str:
    if model.layer_scale is not None:
        return "beit"
    return "deit" if model.distilled else "vit"


_BEIT = {  # what is BEiT's own, or not
    "layer_scale_init_value": 1e-4,  # any above 0: there is a layer scale
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "drop_path_rate": 0.0,
}


def _hugging_face_config(opened: LoadedWeights) -> dict[str, Any]:
    model, classes = opened.model, opened.classes
    several = {"problem_type": "multi_label_classification"} if opened.multi_label else {}
    return (
        several
        | (_BEIT if model.layer_scale is not None else {})
        | {
            "architectures": [_hugging_face_class(model)],
            "model_type": _model_type(model),
            "attention_probs_dropout_prob": 0.0,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": model.width,
            "id2label": {str(i): name for i, name in enumerate(classes)},
            "image_size": _json(model.image_size),
            "intermediate_size": int(model.width * model.mlp_ratio),
            "label2id": {name: i for i, name in enumerate(classes)},
            "layer_norm_eps": 1e-6,  # transformers would take 1e-12
            "num_attention_heads": model.num_heads,
            "num_channels": model.in_channels,
            "num_hidden_layers": model.depth,
            "patch_size": model.patch_size,
            "qkv_bias": True,
            "torch_dtype": "float32",
        }
    )


def _json(size: Size) -> int | list[int]:
    return size if isinstance(size, int) else list(size)


def _preprocessor_config(opened: LoadedWeights) -> dict[str, Any]:
    # DeiT's own processor distorts images to a square before it crops; this one keeps their shape,
    # as evaluation does here and in the reference.
    rows, columns = sides(opened.image_size)
    resized = [int(side / opened.crop_ratio) for side in (rows, columns)]
    # No processor there covers an oblong in an image's own shape: convert.py says so.
    size = {"height": resized[0], "width": resized[1]}
    if opened.reading.resize == "squash":
        resized, size = [rows, columns], {"height": rows, "width": columns}
    crops = opened.reading.resize != "squash"
    return {
        "image_processor_type": "BitImageProcessor",
        "crop_size": {"height": rows, "width": columns},
        "do_center_crop": crops,
        "do_convert_rgb": opened.model.in_channels == 3,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(opened.mean),
        "image_std": list(opened.std),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": resized[0]} if rows == columns and crops else size,
    }
