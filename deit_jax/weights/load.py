"""Weights from anywhere, and what they say about themselves, fitted to the model asked for.

A source is a file (PyTorch's, .safetensors, .npz, msgpack), a Hugging Face, timm or Orbax folder,
the workdir of a run or `hf-hub:ORG/NAME`; SOURCE::KEY names one of several weights in it.
torch_names.py knows the names in the files, places.py where they are, readers.py their bytes.
"""

import dataclasses
import functools
import re
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax.data.decode import PLAIN
from deit_jax.data.preprocess import InputSpec
from deit_jax.data.view import EvalView, reading_of
from deit_jax.errors import UserError
from deit_jax.models import build, family, registry
from deit_jax.models.build import build_model, compute_dtype
from deit_jax.models.conv import fold_batch_norm
from deit_jax.shapes import Size, per_channel, simplest
from deit_jax.storage import check_scheme, exists, local, to_path
from deit_jax.weights import jax_trees, readers, torch_names
from deit_jax.weights.choices import HEAD_POLICIES
from deit_jax.weights.fit import (
    LoadedWeights,
    architecture,
    check_shapes,
    default_classes,
    fit,
    init_variables,
    name_of,
    num_classes_of,
    target_model,
)
from deit_jax.weights.locate import HUB, WeightsError, is_run, locate, split_key
from deit_jax.weights.metadata import DISBELIEF, Metadata, in_one_line, read_metadata
from deit_jax.weights.places import Wanted
from deit_jax.weights.pretrained import PRETRAINED, hub_id
from deit_jax.weights.torch_names import from_torch
from deit_jax.workdir.saved_run import load_run
from deit_jax.workdir.which import LATEST

_IN_METADATA = ("format", "classes", "image_size", "mean", "std", "crop_ratio", "multi_label")


def load(
    name: str | PurePath | None,
    weights: str | PurePath | None = None,
    num_classes: int | None = None,
    image_size: Size | None = None,
    head: str = "error",
    in_channels: int | None = None,
    *,
    pretrained: bool = False,
    return_spec: bool = False,
    checkpoint: str | int = LATEST,
    ema: bool = False,
) -> tuple[Any, ...]:
    """Return (model, params) for `model.apply({"params": params}, images, train=False)`.

    With `return_spec` (model, params, spec): what the images must be, for `deit_jax.preprocess`.
    With `pretrained` the weights are those published for the name (weights/pretrained.py). Without
    weights the params are random (seed 0). Without a name, as in `load("runs/mine")`, the
    model is the weights' own; so are the numbers of classes and of input channels, and the image
    size, a side or (height, width), that are not given. The first layer is adapted to other
    channels as timm does it.
    A convnet comes with its batch norm folded into the convolutions. `head` is one of
    HEAD_POLICIES; `checkpoint` is one of a run's, latest, best or a step, and `ema` takes the
    moving average of the weights.
    """
    if pretrained and weights is not None:
        raise WeightsError(f"pretrained=True and weights={weights}: give one of them")
    if pretrained:
        weights = PRETRAINED
    name = None if name is None else str(name)
    unknown = weights is None and name is not None and name not in registry.specs()
    if unknown and name is not None and _is_there(name):
        name, weights, unknown = None, name, False  # load("runs/mine")
    if unknown and re.search(r"[/\\.]", name or ""):
        raise WeightsError(f"{name}: no such file or folder")
    if weights is not None:
        which: dict[str, Any] = {"checkpoint": checkpoint, "ema": ema, "in_channels": in_channels}
        opened = load_variables(weights, name, num_classes, image_size, head, **which)
        opened.tell()
        loaded = folded(opened.model, opened.variables)
        return (*loaded, opened.spec) if return_spec else loaded
    if name is None:
        raise WeightsError("neither a model's name nor weights; give one")
    overrides = {} if in_channels is None else {"in_channels": in_channels}
    model = registry.create_model(name, 1000 if num_classes is None else num_classes, **overrides)
    if image_size is not None and hasattr(model, "image_size"):
        model = model.clone(image_size=simplest(image_size))
    loaded = folded(model, init_variables(model, 0))
    return (*loaded, _spec_of_name(name, model, image_size)) if return_spec else loaded


def _is_there(source: str) -> bool:
    check_scheme("weights", source)
    return exists(to_path(split_key(source)[0]))


def _spec_of_name(name: str, model, image_size: Size | None) -> InputSpec:
    """Return what a name says of its images."""
    said, channels = registry.get_spec(name), getattr(model, "in_channels", 3)
    size = getattr(model, "image_size", image_size or said.image_size)
    reading = dataclasses.replace(PLAIN, channels=channels, fill=(0,) * channels)
    view = EvalView(simplest(size), said.crop_ratio, reading)
    mean, std = (_convention(x, channels, "") for x in (said.mean, said.std))
    if not mean:
        raise WeightsError(f"{name}: nothing says the mean and std of {channels} channels")
    return InputSpec(view, mean, std)


def folded(model, variables: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a model and its params for inference: no batch norm is left. By one program."""
    if not variables.get("batch_stats"):
        return model, jax.tree.map(jnp.asarray, variables["params"])
    fold = jax.jit(functools.partial(fold_batch_norm, model=model))
    return model.clone(folded=True), fold(variables)


def open_model(
    source: str | PurePath,
    model: str | None = None,
    *,
    default=None,
    dtype: str = "float32",
    checkpoint: str | int = LATEST,
    ema: bool = False,
) -> LoadedWeights:
    """Return weights as they are, with their own classes and image size.

    `model` is their registered name where they do not say it; `default` a name or config.model for
    weights that neither say it nor have the shapes of one registered model. `checkpoint` and `ema`
    are as in load_variables.
    """
    return load_variables(
        source, model, default=default, dtype=dtype, checkpoint=checkpoint, ema=ema
    )


def load_variables(
    source: str | PurePath,
    model=None,
    num_classes: int | None = None,
    image_size: Size | None = None,
    head: str = "error",
    *,
    in_channels: int | None = None,
    ema: bool = False,
    default=None,
    seed: int = 0,
    dtype: str = "float32",
    checkpoint: str | int = LATEST,
) -> LoadedWeights:
    """Return weights fitted to a model: a registered name, a config.model, or None, their own.

    Position embeddings are resized to the image size, the first layer is adapted to the channels
    and to the patches (first_layer.py), what starts anew is drawn from `seed`, and
    the notes tell of all. `ema` takes the moving average of the weights, of a run or in a file,
    `checkpoint` one of a run's checkpoints: latest, best or a step. Weights without a head need
    `num_classes`, 0 for features, or head="drop". Raise WeightsError (a
    ValueError) with the names and shapes that do not fit.
    """
    if str(source) == PRETRAINED:
        source = HUB + hub_id(getattr(model or default, "name", model or default))
    if head not in HEAD_POLICIES:
        raise WeightsError(f"head={head!r}: choose one of {', '.join(HEAD_POLICIES)}")
    try:
        anew = head == "drop" or num_classes == 0
        sizes = image_size, dtype
        found = _open(str(source), model, default, *sizes, checkpoint, ema, anew)
        if not found.classes and num_classes is None:
            raise ValueError(
                "has no head; `deit embed`, `deit eval --probe=knn` or num_classes=0 take its "
                "features, head='drop' with a number of classes starts a new one"
            )
        target = target_model(found, model, num_classes, image_size, in_channels, head, dtype)
        size = getattr(target, "image_size", image_size or found.image_size)
        fitted = fit(found, target, head, seed)
    except DISBELIEF as error:
        named = str(error).startswith(split_key(str(source))[0])
        prefix = "" if named else f"{source}: "
        raise WeightsError(f"{prefix}{in_one_line(error)}") from error
    notes = (*fitted.notes, *_damage(fitted.variables))
    return dataclasses.replace(fitted, image_size=size, name=name_of(model, fitted), notes=notes)


def _damage(variables: dict[str, Any]) -> tuple[str, ...]:
    """Return a note on parameters that are no numbers."""
    bad = [path for path, leaf in torch_names.leaves(variables) if not np.isfinite(leaf).all()]
    if not bad:
        return ()
    return (f"{len(bad)} parameters are not finite, {bad[0]} first: the weights are damaged",)


def _open(
    source: str,
    model,
    default,
    image_size: Size | None,
    dtype: str,
    checkpoint: str | int,
    ema: bool,
    anew: bool,
) -> LoadedWeights:
    """Return the weights in their own model; `anew` says that nobody needs their head."""
    place, key = split_key(source)
    path = locate(place)
    if is_run(path):
        if key:
            raise ValueError(f"::{key:.60}: the run of a `deit train` has no parts; leave it out")
        run = _open_run(source, path, model, dtype, checkpoint)
        return _averaged(run) if ema else run
    if checkpoint != LATEST:
        raise ValueError(f"checkpoint={checkpoint} is of a run, and this is none; leave it out")
    here = local(path)  # Orbax reads a run where it is; what is in a bucket is copied else
    part = readers.read_part(here, Wanted(ema, key))
    flat, positions = torch_names.without_zero_position(part.tensors)
    metadata, notes = _told_of(part, read_metadata(here), positions), part.notes
    asked = _described(model)[0]
    name, overrides = _identify(flat, metadata, model, default, (metadata.image_size, image_size))
    flat, left_out = torch_names.without_hidden_head(flat, anew)
    variables = from_torch(flat, name, **overrides)
    classes = num_classes_of(variables, registry.create_model(name, **overrides))
    model = registry.create_model(name, classes, dtype=compute_dtype(dtype), **overrides)
    spec = registry.get_spec(name)
    if name not in (asked, metadata.name) and metadata.mean is None:
        notes += _assumed(name)
    known = metadata.classes if metadata.classes and len(metadata.classes) == classes else None
    channels = getattr(model, "in_channels", 3)
    return LoadedWeights(
        source=source,
        format=metadata.format,
        name=name,
        model=model,
        variables={"batch_stats": {}, **variables},
        classes=known or default_classes(classes),
        image_size=getattr(model, "image_size", metadata.image_size or spec.image_size),
        mean=_convention(metadata.mean or spec.mean, channels, "mean"),
        std=_convention(metadata.std or spec.std, channels, "std"),
        crop_ratio=metadata.crop_ratio or spec.crop_ratio,
        reading=metadata.read_as(channels, metadata.mean or spec.mean),
        multi_label=metadata.multi_label,
        notes=(*notes, *left_out, *metadata.notes),
    )


def _told_of(part: readers.Part, metadata: Metadata, positions: dict[str, Any]) -> Metadata:
    """Return what a source says of itself with what its arrays tell."""
    if not part.format or metadata.name:
        return dataclasses.replace(metadata, overrides=metadata.overrides | positions)
    notes, half = metadata.notes, metadata.mean
    if part.googles and half is None:
        half = family.HALF
        notes += ("mean and std 0.5 of images, and exact GELU, as timm reads these weights",)
    told = {"num_heads": part.num_heads} if part.num_heads else {}
    return dataclasses.replace(
        metadata, format=part.format, overrides=told, mean=half, std=half, notes=notes
    )


def _assumed(name: str) -> tuple[str, ...]:
    """Return a note on the convention taken for weights that might be a ViT's or a DeiT's."""
    other = torch_names.twin(name)
    if other is None:
        return ()
    ours, theirs = (registry.get_spec(n) for n in (name, other))
    text = f"mean {ours.mean} and std {ours.std} of images assumed"
    return (f"taken for a {name}: {text}; --model={other} takes {theirs.mean} and {theirs.std}",)


def _convention(values: tuple[float, ...], channels: int, key: str) -> tuple[float, ...]:
    """Return a number for each channel; () where they are not known, as of many channels."""
    if len(values) in (1, channels):
        return per_channel(values, channels)
    if channels == 3:
        raise ValueError(f"{key}={values}: must be three numbers, one per channel")
    return ()


def _open_run(
    source: str, path: PurePath, model, dtype: str, checkpoint: str | int
) -> LoadedWeights:
    try:
        run = load_run(path, dtype, checkpoint)
    except UserError as error:  # of its own config, which is not the one at hand
        raise ValueError(str(error)) from error
    check_shapes(run.variables, run.model, run.model)
    name, data = run.config.model.name, run.config.data
    metadata = Metadata(
        format="deit_jax run",
        classes=run.classes,
        image_size=build.image_size(run.config.model),
        mean=per_channel(data.mean, data.channels),
        std=per_channel(data.std, data.channels),
        crop_ratio=data.eval_crop_ratio,
        multi_label=data.multi_label,
    )
    if isinstance(model, str) and model != name:
        raise ValueError(f"{source} holds the run of a {name}, not of a {model}")
    return LoadedWeights(
        source=source,
        name=name,
        model=run.model,
        variables=run.variables,
        run=run,
        reading=reading_of(data),
        **{key: getattr(metadata, key) for key in _IN_METADATA},
    )


def _averaged(found: LoadedWeights) -> LoadedWeights:
    if found.run is None or found.run.ema is None:
        raise ValueError("has no moving average of its weights")
    return dataclasses.replace(found, variables=found.run.ema)


def _identify(
    flat, metadata: Metadata, model, default, sizes: tuple[Size | None, ...]
) -> tuple[str, dict[str, Any]]:
    """Return the registered name and the overrides of the model that tensors belong to."""
    name, overrides = _described(model)
    name, googles = name or metadata.name, jax_trees.is_googles(flat)
    if name is None:
        names = torch_names.candidates(flat, "vit_" if googles else "deit")
        if len(names) > 1:
            raise ValueError(f"may be {' or '.join(names)}; say which with --model")
        name, overrides = (names[0], {}) if names else _described(default)
    if name is None:
        shown = ", ".join(f"{k}={v}" for k, v in torch_names.transformer_fields(flat).items())
        raise ValueError(f"no registered model has these shapes ({shown}); name one with --model")
    if name == metadata.name:
        overrides = dict(metadata.overrides)
    if "positions" in (fields := torch_names.transformer_fields(flat)):
        own = registry.create_model(name, **overrides)
        heads = metadata.overrides.get("num_heads", getattr(own, "num_heads", None))
        if heads != getattr(own, "num_heads", None):
            raise ValueError(f"has {heads} heads of attention, {name} has {own.num_heads}")
        if hasattr(own, "distilled"):
            if model is not None and not isinstance(model, str):  # which is to be fitted
                overrides |= _patches(fields, own)
            told = ("distilled", "dist_head", *(("class_position",) if googles else ()))
            overrides |= {k: fields[k] for k in told if k in fields}
            overrides |= _resolution(fields, name, overrides, sizes)
    own = registry.create_model(name, **overrides)
    canonical = {k: flat[v] for k, v in torch_names.canonical_names(flat, own).items()}
    if (channels := torch_names.input_channels(canonical, own)) not in (None, 3):
        overrides.setdefault("in_channels", channels)
    return name, overrides


def _patches(fields, own) -> dict[str, Any]:
    """Return the patch size that a file tells of, and an image size that goes with it."""
    patch = fields.get("patch_size", own.patch_size)
    if patch == own.patch_size:
        return {}
    return {"patch_size": patch, "image_size": fields.get("grid", 1) * patch}


def _resolution(
    fields, name: str, overrides: dict[str, Any], sizes: tuple[Size | None, ...]
) -> dict[str, Any]:
    """Return the image size that positions tell of, {} where the name's or the file's own fits.

    An oblong grid cannot be seen: it is that of the first of some `sizes` that fits.
    """
    own = registry.create_model(name, **overrides)

    def positions(model) -> int:
        return model.num_patches + (model.num_prefix_tokens if model.class_position else 0)

    if positions(own) == fields["positions"]:
        return {}
    if "grid" in fields:
        return {"image_size": fields["grid"] * own.patch_size}
    for size in sizes:
        if size is not None and positions(own.clone(image_size=size)) == fields["positions"]:
            return {"image_size": simplest(size)}
    raise ValueError(
        f"a position embedding of {fields['positions']} tokens is no square grid; give the size "
        "of the images that it is for, (height, width)"
    )


def _described(model) -> tuple[str | None, dict[str, Any]]:
    """Return the name and the overrides in a name, a config.model or None."""
    if model is None or isinstance(model, str):
        return model, {}
    built = build_model(model, 1)
    return model.name, architecture(built, model.name)
