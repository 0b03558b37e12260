"""Write weights as timm, facebookresearch/deit, Hugging Face or a run of ours would.

None of it needs PyTorch. Every writer raises ValueError, before it writes, if the format cannot
hold the model.
"""

import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from deit_jax import checkpoint, cli, metrics
from deit_jax import config as config_lib
from deit_jax.claims import METADATA
from deit_jax.dialects import to_torch
from deit_jax.step import TrainState
from deit_jax.weights import Opened, architecture, default_classes

_STORAGES = {"float32": "FloatStorage", "int64": "LongStorage"}
_BICUBIC = 3  # Pillow's number


def write_timm(opened: Opened, path: Path) -> None:
    """Write a safetensors file with timm's names; its metadata describes the model to us."""
    described = {
        "name": opened.name,
        "overrides": architecture(opened.model, opened.name),
        "image_size": opened.image_size,
        "mean": opened.mean,
        "std": opened.std,
        "crop_ratio": opened.crop_ratio,
    }
    if opened.classes != default_classes(len(opened.classes)):
        described["classes"] = opened.classes
    metadata = {"format": "pt", METADATA: json.dumps(described)}
    _write(to_torch(opened.variables), path, metadata)


def _write(flat: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    # Not safetensors' save_file: what it writes nobody but the owner may read, whatever the umask.
    path.write_bytes(save(flat, metadata=metadata))


# Our fields that have another name among the arguments of timm's VisionTransformer.
_TIMM = {"image_size": "img_size", "width": "embed_dim", "layer_scale": "init_values"}


def timm_call(opened: Opened, path: Path) -> str | None:
    """Return the Python call that gives timm's model with the file's weights.

    None where create_model has no such arguments: a convnet of other shapes than its name's.
    """
    name, fields = opened.name, architecture(opened.model, opened.name)
    if not hasattr(opened.model, "grid_size"):
        if fields:
            return None
        name = f"tf_{name}" if name.startswith("efficientnet_lite") else name
    elif not {"dist_head", "class_position", "distilled"}.isdisjoint(fields):
        return None
    arguments = {"num_classes": len(opened.classes)}
    arguments |= {_TIMM.get(key, key): fields[key] for key in sorted(fields)}
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({name!r}, checkpoint_path={str(path)!r}, {given})"


def transformers_call(opened: Opened, folder: Path) -> str:
    """Return the Python call that gives transformers' model with the folder's weights."""
    return f"transformers.{_hugging_face_class(opened.model)}.from_pretrained({str(folder)!r})"


def write_deit(opened: Opened, path: Path) -> None:
    """Write {"model": tensors} in PyTorch's zip format, with facebookresearch/deit's names.

    The file does not say which model it is of.
    """
    flat = to_torch(opened.variables, "deit")
    tensors = b"".join(_atom(name) + _tensor(i, x) for i, (name, x) in enumerate(flat.items()))
    tree = b"\x80\x02}(" + _atom("model") + b"}(" + tensors + b"uu."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", tree)
        archive.writestr("archive/byteorder", "little")
        for i, value in enumerate(flat.values()):
            little = value.astype(value.dtype.newbyteorder("<"))
            archive.writestr(f"archive/data/{i}", little.tobytes())
        archive.writestr("archive/version", "3\n")


def _atom(value: Any) -> bytes:
    """Return the opcodes that push a string, a number or a tuple of them."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _tensor(key: int, value: np.ndarray) -> bytes:
    """Return the opcodes that rebuild a tensor from storage `key`.

    They call torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks).
    """
    storage = f"ctorch\n{_STORAGES[value.dtype.name]}\n".encode()
    place = _atom(str(key)) + _atom("cpu") + _atom(value.size)
    strides = tuple(step // value.itemsize for step in value.strides)
    shape = _atom(0) + _atom(value.shape) + _atom(strides) + _atom(False)
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + (_atom("storage") + storage + place + b"tQ")
        + (shape + hooks + b"tR")
    )


def write_hugging_face(opened: Opened, folder: Path) -> None:
    """Write a folder for transformers: DeiT with teacher if distilled, otherwise ViT."""
    model = opened.model
    if not hasattr(model, "grid_size") or model.layer_scale is not None or not model.class_position:
        raise ValueError(
            f"transformers has no {opened.name}, only DeiT and ViT; write a .safetensors file, "
            "which timm reads"
        )
    flat = to_torch(opened.variables, "huggingface")
    folder.mkdir(parents=True, exist_ok=True)
    _write(flat, folder / "model.safetensors", {"format": "pt"})
    metrics.write_json(folder / "config.json", _hugging_face_config(opened))
    metrics.write_json(folder / "preprocessor_config.json", _preprocessor_config(opened))


def _hugging_face_class(model) -> str:
    if not model.distilled:
        return "ViTForImageClassification"
    return f"DeiTForImageClassification{'WithTeacher' if model.dist_head else ''}"


def _hugging_face_config(opened: Opened) -> dict[str, Any]:
    model, classes = opened.model, opened.classes
    return {
        "architectures": [_hugging_face_class(model)],
        "model_type": "deit" if model.distilled else "vit",
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": model.width,
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "image_size": model.image_size,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "label2id": {name: i for i, name in enumerate(classes)},
        "layer_norm_eps": 1e-6,  # transformers would take 1e-12
        "num_attention_heads": model.num_heads,
        "num_channels": 3,
        "num_hidden_layers": model.depth,
        "patch_size": model.patch_size,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }


def _preprocessor_config(opened: Opened) -> dict[str, Any]:
    # DeiT's own processor distorts images to a square before it crops; this one keeps their shape,
    # as evaluation does here and in the reference.
    size = opened.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(opened.mean),
        "image_std": list(opened.std),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": int(size / opened.crop_ratio)},
    }


def write_run(opened: Opened, workdir: Path) -> None:
    """Write a workdir whose only checkpoint, of step 0, holds the weights and no optimizer."""
    config = _run_config(opened)
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_json(workdir / "classes.json", opened.classes)
    metrics.write_json(workdir / "config.json", config_lib.to_json(config))
    params, stats = opened.variables["params"], opened.variables["batch_stats"]
    saver = checkpoint.Checkpointer(workdir, keep=1)
    saver.save(0, TrainState(np.int32(0), *jax.device_get((params, stats)), (), None), None)
    saver.close()


def _run_config(opened: Opened):
    """Return the default config with the weights' model and the input that they expect."""
    if str(cli.REPOSITORY) not in sys.path:  # configs/ lies beside the package
        sys.path.append(str(cli.REPOSITORY))
    from configs import base

    config = base.get_config()
    config.model = base.get_model_config(opened.name)
    fields = architecture(opened.model, opened.name)
    if not hasattr(opened.model, "image_size"):
        fields["image_size"] = opened.image_size
    for key, value in fields.items():
        config.model[key] = value
    config.data.mean, config.data.std = opened.mean, opened.std
    config.data.eval_crop_ratio = opened.crop_ratio
    return config
