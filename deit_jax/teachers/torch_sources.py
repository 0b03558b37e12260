"""Torch modules by what people call them: timm's names, functions of their own, HF folders."""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from deit_jax.errors import UserError
from deit_jax.shapes import Size, simplest, text
from deit_jax.storage import backend, exists, local
from deit_jax.teachers.functions import call_function
from deit_jax.teachers.programs import first_line
from deit_jax.teachers.torch_convert import Source
from deit_jax.teachers.torch_graph import quiet
from deit_jax.teachers.torch_import import import_package

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONVENTIONS = ("classes", "mean", "std", "image_size", "channels", "multi_label")


class _TimmHeads(torch.nn.Module):
    """A timm model's logits, and what enters its classifier."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        inside = self.model.forward_features(images)
        logits = self.model.forward_head(inside)
        return logits, self.model.forward_head(inside, pre_logits=True)


def open_timm(
    asked: str,
    num_classes: int | None = None,
    image_size: Size | None = None,
    ema: bool = False,
) -> Source:
    """Return the model of `timm:NAME[@FILE]`: its published weights, or those in FILE."""
    name, _, file = asked.partition(":")[2].partition("@")
    timm = import_package("timm", asked)
    data = import_package("timm.data", asked)
    if ema and not file:
        raise UserError(f"{asked}: --ema is for a FILE that holds a moving average")
    notes: list[str] = []
    if file:
        model = _from_file(timm, asked, name, file, image_size, ema, notes)
    else:
        options = {"pretrained": True} | ({"num_classes": 0} if num_classes == 0 else {})
        model = _create(timm, asked, name, image_size, options)
    count = model.num_classes
    if num_classes == 0 and count:
        model.reset_classifier(0)
    elif num_classes not in (None, count):
        raise UserError(
            f"{asked}: --num_classes={num_classes}: its weights have {count} classes; leave it "
            "out, or give 0 for the features alone"
        )
    inputs = data.resolve_model_data_config(model)
    channels, height, width = inputs["input_size"]
    classes, also_called = _timm_classes(data, model) if num_classes != 0 else ((), ())
    if file and classes:
        notes.append(f"its {len(classes)} classes are taken for ImageNet's, in their usual order")
    alone = not model.num_classes
    return Source(
        asked=asked,
        name=name,
        module=model,
        mean=inputs["mean"],
        std=inputs["std"],
        image_size=image_size or simplest((height, width)),
        channels=channels,
        classes=classes,
        also_called=also_called,
        crop_ratio=inputs["crop_pct"],
        interpolation=inputs["interpolation"],
        multi_label=False if classes else None,
        with_features=None if alone or not hasattr(model, "forward_head") else _TimmHeads(model),
        features_alone=alone,
        notes=tuple(notes),
    )


def _create(timm, asked: str, name: str, image_size: Size | None, options: dict[str, Any]):
    """Return a model of timm, for images of a size where its architecture depends on it."""
    try:
        if image_size is not None:
            with contextlib.suppress(TypeError):  # of convnets, which take any size
                return timm.create_model(name, img_size=image_size, **options)
        return timm.create_model(name, **options)
    except Exception as error:  # timm's own, the hub client's and the operating system's
        reason = f"{' '.join(str(error).split()):.240}"
        if "Unknown model" in reason:
            near = ", ".join(timm.list_models(f"*{name.partition('.')[0][:6]}*")[:5])
            raise UserError(
                f"{asked}: timm {timm.__version__} knows no such model; {near}"
            ) from error
        remedy = (
            f"; timm:{name}@FILE takes weights that are here" if "pretrained" in options else ""
        )
        size = "" if image_size is None else f" for images of {text(image_size)}"
        raise UserError(f"{asked}: cannot be made{size} ({reason}){remedy}") from error


def _from_file(timm, asked, name, file, image_size, ema: bool, notes: list[str]):
    """Return a model with the weights in a file, and as many classes as its classifier has."""
    file = str(local(file))
    if not exists(Path(file)):
        raise UserError(f"{asked}: {file}: no such file")
    helpers = import_package("timm.models._helpers", asked)
    try:
        state = helpers.load_state_dict(file, use_ema=ema, weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError("no dict of names and tensors")
    except Exception as error:  # of many kinds: of pickle, zip, safetensors and torch
        raise UserError(f"{asked}: {file} holds no weights ({first_line(error)})") from error
    averaged = _has_average(file)
    if ema and not averaged:
        raise UserError(f"{asked}: {file} holds no moving average; leave --ema out")
    if averaged and not ema:
        notes.append("the file holds a moving average too, which --ema would take")
    plain = _create(timm, asked, name, None, {})
    _check_colours(asked, plain, state)
    heads = plain.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    sizes = {len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state}
    options = {"num_classes": max(sizes, default=0)}
    model = _create(timm, asked, name, image_size, options)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        try:
            if convert is None:
                raise error
            model.load_state_dict(fitted := convert(dict(state), model))
            notes += _resampled(state, fitted)
        except Exception as again:
            reason = " ".join(str(again).split())
            raise UserError(
                f"{asked}: {file} does not fit timm's {name} ({reason:.240}); name the model that "
                "it was trained as"
            ) from again
    return model


def _resampled(state: dict[str, torch.Tensor], fitted: dict[str, torch.Tensor]) -> list[str]:
    """Return a note on tensors that timm gave another shape; raise ValueError for a first layer's.

    Positions follow the size of the images. Patches of another size are another network.
    """
    both = state.keys() & fitted.keys()
    changed = sorted(k for k in both if state[k].numel() != fitted[k].numel())
    for name in changed:
        before, after = (list(x[name].shape) for x in (state, fitted))
        if state[name].ndim == 4 and fitted[name].ndim == 4 and "pos" not in name:
            raise ValueError(f"{name} is {before} there, and {after} in timm's model")
    if not changed:
        return []
    shapes = (list(x[changed[0]].shape) for x in (state, fitted))
    resized = " to ".join(map(str, shapes))
    others = f", and {len(changed) - 1} others" if len(changed) > 1 else ""
    return [f"{changed[0]} resized from {resized}{others}"]


def _has_average(file: str) -> bool:
    """Return whether a checkpoint, which was read before, has a moving average of its weights."""
    if file.endswith(".safetensors"):
        return False
    with contextlib.suppress(Exception):  # of files of the older format, which cannot be mapped
        whole = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return bool(whole.get("state_dict_ema") or whole.get("model_ema"))
    return False


def _check_colours(asked: str, model: Any, state: dict[str, torch.Tensor]) -> None:
    """Raise UserError for weights of other channels than three: nothing says their mean and std."""
    first = model.pretrained_cfg.get("first_conv")
    kernel: Any = state.get(f"{first}.weight") if isinstance(first, str) else None
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] != 3:
        raise UserError(
            f"{asked}: its weights are for images of {kernel.shape[1]} channels, whose mean and "
            "std no file of timm says; return it from a function of yours, torch:MODULE:FUNCTION, "
            "with mean, std and channels"
        )


def _timm_classes(data, model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the ids of ImageNet's classes and their names, () where it has others."""
    subset = data.infer_imagenet_subset(model)
    if not subset:
        return (), ()
    info = data.ImageNetInfo(subset)
    names, described = info.label_names(), info.label_descriptions()
    return (tuple(names), tuple(described)) if len(names) == model.num_classes else ((), ())


def open_function(asked: str) -> Source:
    """Return the module that `torch:module:function` returns, alone or with its conventions."""
    made = call_function(asked)
    module, said = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module) or not isinstance(said, dict | None):
        raise UserError(
            f"{asked}: returns a {type(made).__name__}, not a torch.nn.Module or (module, dict of "
            f"{', '.join(CONVENTIONS)})"
        )
    said = said or {}
    if unknown := sorted(map(str, said.keys() - set(CONVENTIONS))):
        raise UserError(
            f"{asked}: unknown convention {unknown[0]}; known: {', '.join(CONVENTIONS)}"
        )
    channels = said.get("channels", 3)
    taken: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "image_size": 224}
    missing = [key for key in taken if key not in said]
    if channels != 3 and {"mean", "std"} & set(missing):
        raise UserError(f"{asked}: say the mean and std of its {channels} channels")
    known = taken | said
    size = known["image_size"]
    if isinstance(known["std"], list | tuple) and not all(x > 0 for x in known["std"]):
        raise UserError(f"{asked}: std={known['std']} must be above 0")
    notes = (
        "not said by the function and taken: "
        + ", ".join(f"{key}={known[key]}" for key in missing),
    )
    try:
        return Source(
            asked=asked,
            name=asked.rpartition(":")[2],
            module=module,
            mean=_floats(known["mean"], channels),
            std=_floats(known["std"], channels),
            image_size=_size(size),
            channels=channels,
            classes=tuple(map(str, said.get("classes", ()))),
            multi_label=said.get("multi_label"),
            notes=notes if missing else (),
        )
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{asked}: its conventions are not what they must be ({error})") from error


def _floats(values: Any, channels: int) -> tuple[float, ...]:
    numbers = tuple(map(float, values))
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{numbers} of mean or std")
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels={channels}")
    if len(numbers) != channels:
        raise ValueError(f"{len(numbers)} numbers of mean or std for {channels} channels")
    return numbers


def _size(value: Any) -> Size:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"image_size={value}")
    return simplest((pair[0], pair[1]))


class _Answer(torch.nn.Module):
    """What of a transformers model's output teaches: its logits, or its pooled features."""

    def __init__(self, model, logits: bool, pooler: bool):
        super().__init__()
        self.model, self.logits, self.pooler = model, logits, pooler

    def forward(self, images):
        said = self.model(pixel_values=images)
        if self.logits:
            return said.logits
        pooled = said.get("pooler_output") if self.pooler else None
        return said.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def open_hugging_face(asked: str) -> Source:
    """Return the network of a folder that transformers wrote, of any class that it knows."""
    transformers = import_package("transformers", asked)
    folder = local(asked)
    file = folder / "preprocessor_config.json"
    if not exists(file):
        raise UserError(
            f"{asked}: no preprocessor_config.json says its image_mean, image_std and size; write "
            "it with save_pretrained of its image processor"
        )
    try:
        inputs = json.loads(backend(file).read(file))
        mean, std = inputs.get("image_mean"), inputs.get("image_std")
        size, crop_ratio = _hf_size(inputs)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{file}: cannot be understood ({first_line(error)})") from error
    model, config, pooler = _hf_model(transformers, str(folder))
    channels = getattr(config, "num_channels", 3)
    if inputs.get("do_normalize") is False:
        mean, std = [0.0] * channels, [1.0] * channels
    if not all(isinstance(x, list) and len(x) == channels for x in (mean, std)):
        raise UserError(f"{file}: must say image_mean and image_std of {channels} channels")
    logits = type(model).__name__.endswith("ForImageClassification")
    labels = [str(config.id2label[i]) for i in sorted(config.id2label)] if logits else []
    if any(label.startswith("LABEL_") for label in labels):  # transformers' own placeholders
        labels = []
    kinds = {"multi_label_classification": True, "single_label_classification": False}
    return Source(
        asked=asked,
        name=folder.resolve().name,
        module=_Answer(model, logits, pooler),
        mean=tuple(mean),
        std=tuple(std),
        image_size=size or getattr(config, "image_size", None) or 224,
        channels=channels,
        classes=labels,
        crop_ratio=crop_ratio,
        multi_label=kinds.get(str(getattr(config, "problem_type", None))),
        features_alone=not logits,
        notes=() if logits else (_HEADLESS + ("" if pooler else _UNPOOLED),),
    )


_HEADLESS = "it has no head for images: features alone"
_UNPOOLED = ", of the class token, as its pooler was not saved"


def _hf_model(transformers, asked: str):
    """Return the model in a folder, its config and whether its pooler's weights are there.

    Of the others none may be missing, or transformers would make them up.
    """
    try:
        with quiet():  # its bars and tables say in many lines what is one line here
            config = transformers.AutoConfig.from_pretrained(asked)
            names = [str(name) for name in config.architectures or ()]
            has_head = any(name.endswith("ForImageClassification") for name in names)
            kind = "AutoModelForImageClassification" if has_head else "AutoModel"
            model, said = getattr(transformers, kind).from_pretrained(
                asked, config=config, output_loading_info=True
            )
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())
        raise UserError(f"{asked}: transformers cannot open it ({reason:.240})") from error
    lacking = sorted(said["missing_keys"])
    pooler = not any("pooler" in name for name in lacking)
    lacking = [name for name in lacking if has_head or "pooler" not in name]
    if lacking:
        raise UserError(f"{asked}: its weights lack {', '.join(lacking[:3])}; it is not whole")
    return model, config, pooler


def _hf_size(inputs: dict[str, Any]) -> tuple[Size | None, float | None]:
    """Return the size of images and the side of the crop by that of what it is cut from."""

    def pair(value):
        if isinstance(value, dict):
            if "shortest_edge" in value:
                value = value["shortest_edge"]
            else:
                return (int(value["height"]), int(value["width"]))
        return None if value is None else (int(value), int(value))

    size, crop = pair(inputs.get("size")), pair(inputs.get("crop_size"))
    if size is not None and crop is not None and inputs.get("do_center_crop"):
        return simplest(crop), min(crop) / min(size)
    ratio = inputs.get("crop_pct")
    return (None if size is None else simplest(size)), (None if size is None else ratio or 1.0)
