"""Weights of one model, made those of another: positions resized, tokens and heads anew."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax.data.classes import align
from deit_jax.data.decode import PLAIN, Reading
from deit_jax.data.preprocess import InputSpec
from deit_jax.data.view import EvalView
from deit_jax.models import registry
from deit_jax.models.build import build_model
from deit_jax.models.pos_embed import resize_pos_embed
from deit_jax.shapes import Size, input_shape, simplest
from deit_jax.weights import torch_names
from deit_jax.weights.first_layer import adapt_channels, resample_patches
from deit_jax.weights.locate import WeightsError
from deit_jax.workdir.saved_run import Run

log = logging.getLogger("deit_jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """Weights with the model that they fit, and the input that they expect.

    `format` says what the source is, `notes` what was changed on the way in, `run` is the training
    run if it is one. `mean` and `std` are () where nothing says them, as of many channels.
    """

    source: str
    format: str
    name: str
    model: Any
    variables: dict[str, Any]
    classes: list[str]
    image_size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    multi_label: bool | None = None  # whether each class is answered by itself; None: not said
    reading: Reading = PLAIN
    notes: tuple[str, ...] = ()
    run: Run | None = None

    @property
    def view(self) -> EvalView:
        """What the model is shown of an image, by its own size, crop and way of reading."""
        return EvalView(self.image_size, self.crop_ratio, self.reading)

    @property
    def spec(self) -> InputSpec:
        """What images must be, for people; raise WeightsError where it is not known."""
        self.check_convention()
        return InputSpec(self.view, self.mean, self.std)

    def tell(self) -> None:
        """Say in the log what was chosen, assumed and changed on the way in."""
        for note in self.notes:
            log.warning("%s: %s", self.source, note)

    def check_convention(self) -> None:
        """Raise WeightsError where nothing says how images are normalised for these weights."""
        if not self.mean or not self.std:
            raise WeightsError(
                f"{self.source}: nothing says the mean and std of its {self.reading.channels} "
                "channels; train from it with config.init.weights, which keeps them"
            )


def architecture(model, name: str) -> dict[str, Any]:
    """Return the fields that the model of a name must be given to have this model's shapes."""
    plain = registry.create_model(name, model.num_classes)
    ignored = {"num_classes", "dtype", "drop_path", "constant_drop_path", "dropout", "remat"}
    ignored |= {"attention", "folded", "parent", "name"}
    names = {f.name for f in dataclasses.fields(model)} - ignored
    return {k: getattr(model, k) for k in names if getattr(model, k) != getattr(plain, k)}


def default_classes(count: int) -> list[str]:
    """Return the names of classes whose names are not known."""
    return [f"class {i}" for i in range(count)]


def num_classes_of(variables: dict[str, Any], model) -> int:
    """Return how many classes a model of these variables knows, 0 without a head."""
    layer = variables["params"]
    for name in registry.family_of(model).heads[0].split("/"):
        layer = layer.get(name, {})
    return layer["kernel"].shape[-1] if "kernel" in layer else 0


def target_model(
    found: LoadedWeights, model, num_classes, image_size, in_channels, head: str, dtype: str
):
    """Return the model that weights shall fit."""
    classes = len(found.classes) if num_classes is None else num_classes
    found_head = getattr(found.model, "dist_head", True)
    if model is None or isinstance(model, str):
        target = found.model.clone(num_classes=classes)
        if hasattr(target, "distilled") and isinstance(model, str):
            distilled = registry.create_model(model).distilled
            target = target.clone(distilled=distilled, dist_head=head != "error" or found_head)
        elif hasattr(target, "distilled") and head == "cls":
            target = target.clone(distilled=False)
    else:
        target = build_model(model, classes, dtype, channels=in_channels)
    if image_size is not None and hasattr(target, "image_size"):
        target = target.clone(image_size=simplest(image_size))
    if in_channels is not None and getattr(target, "in_channels", 3) != in_channels:
        target = target.clone(in_channels=in_channels)
    return target


def name_of(model, fitted: LoadedWeights) -> str:
    """Return the name that was asked for, or else the weights' own with or without `_distilled`."""
    if model is not None:
        return model if isinstance(model, str) else model.name
    name, distilled = fitted.name, getattr(fitted.model, "distilled", False)
    twin = name.replace("_distilled", "")
    twin = twin.replace("_patch", "_distilled_patch") if distilled else twin
    return twin if twin in registry.specs() else name


def fit(found: LoadedWeights, model, head: str, seed: int) -> LoadedWeights:
    """Return the weights with the positions, tokens and heads of another model."""
    if model == found.model and head == "error":
        return found
    old, count = found.model, len(found.classes)
    params, notes, fresh = dict(found.variables["params"]), list(found.notes), set()
    _check_classes(count, model, head)
    notes += _fit_channels(params, old, model)
    if "pos_embed" in params and hasattr(model, "grid_size"):
        notes += _fit_patches(params, old, model)
        notes += _fit_positions(params, old, model)
        notes += _fit_class_position(params, old, model)
        notes += _fit_tokens(
            params, old.clone(class_position=model.class_position), model, head, seed
        )
    heads = {path.partition("/")[0] for path in registry.family_of(model).heads}
    if not model.num_classes:
        params = {name: layer for name, layer in params.items() if name not in heads}
    elif head == "drop":
        fresh |= heads & torch_names.shapes(model)["params"].keys()
        had = f"dropped: {count} ->" if count else "start anew:"
        notes.append(f"heads {had} {model.num_classes} classes")
    elif head == "cls" and "dist_token" in params and old.distilled:
        fresh.add("head_dist")
        notes.append("distillation head starts anew")
    if "dist_token" in params and not (model.dist_head and model.num_classes):
        params.pop("head_dist", None)
        fresh.discard("head_dist")
    elif "dist_token" in params and "head_dist" not in params and head != "error":
        fresh.add("head_dist")
    if fresh:
        params |= init_variables(model, seed, only=tuple(sorted(fresh)))["params"]
    variables = found.variables | {"params": params}
    check_shapes(variables, old, model)
    same = model.num_classes == count and head != "drop"
    classes = found.classes if same else default_classes(model.num_classes)
    fitted = dataclasses.replace(
        found, model=model, variables=variables, classes=classes, notes=tuple(notes)
    )
    if found.run is not None and found.run.ema is not None:  # which goes the same way
        alone = dataclasses.replace(found, variables=found.run.ema, run=None)
        average = fit(alone, model, head, seed).variables
        fitted = dataclasses.replace(fitted, run=dataclasses.replace(found.run, ema=average))
    channels = getattr(model, "in_channels", 3)
    if channels == getattr(old, "in_channels", 3):
        return fitted
    reading = dataclasses.replace(found.reading, channels=channels, fill=(0,) * channels)
    return dataclasses.replace(fitted, mean=(), std=(), reading=reading)


def _check_classes(count: int, model, head: str) -> None:
    """Raise ValueError where the heads of weights of `count` classes are not the model's."""
    if model.num_classes in (0, count) or head == "drop":
        return
    if not count:
        raise ValueError("has no head; head='drop' starts a new one")
    raise ValueError(
        f"the weights know {count} classes, the model {model.num_classes}; head='drop' starts "
        "new heads"
    )


def in_order(
    found: LoadedWeights,
    classes: list[str],
    whose: str,
    where: str,
    may_know_more: bool = False,
) -> tuple[LoadedWeights, str]:
    """Return weights whose heads have the classes of a data set in its order, and a note on it.

    With `may_know_more` heads lose the classes that the data set does not have. Raise UserError
    where the two lists of names do not go together; see data/classes.py.
    """
    order, note = align(found.classes, classes, whose, where, may_know_more)
    if order is None:
        return found, note
    run = found.run
    if run is not None and run.ema is not None:
        run = dataclasses.replace(run, ema=_reordered(run.ema, found.model, order))
    variables = _reordered(found.variables, found.model, order)
    model = found.model.clone(num_classes=len(classes))
    known = {"model": model, "variables": variables, "classes": list(classes), "run": run}
    return dataclasses.replace(found, **known), note


def _reordered(variables: dict[str, Any], model, order: np.ndarray) -> dict[str, Any]:
    params = dict(variables["params"])
    for path in registry.family_of(model).heads:
        top, _, rest = path.partition("/")
        if top in params:
            params[top] = _columns(params[top], rest.split("/") if rest else [], order)
    return {**variables, "params": params}


def _columns(layer: dict[str, Any], path: list[str], order: np.ndarray) -> dict[str, Any]:
    if path:
        return {**layer, path[0]: _columns(layer[path[0]], path[1:], order)}
    return {name: np.asarray(array)[..., order] for name, array in layer.items()}


def _fit_channels(params: dict[str, Any], old, model) -> list[str]:
    """Adapt the convolution that reads the image to the model's channels; return the note on it."""
    have, want = (getattr(m, "in_channels", 3) for m in (old, model))
    if have == want:
        return []
    if not (stem := registry.family_of(model).stem):
        raise ValueError(f"weights of {have} channels, and a family whose first layer is not known")
    top, *rest = stem.split("/")
    layer = params[top] = dict(params[top])
    for name in rest:
        layer[name] = dict(layer[name])
        layer = layer[name]
    layer["kernel"] = adapt_channels(np.asarray(layer["kernel"]), want)
    return [f"first layer adapted from {have} to {want} channels"]


def _fit_patches(params: dict[str, Any], old, model) -> list[str]:
    """Resample the first layer for patches of another size; return the note on it."""
    have, want = old.patch_size, model.patch_size
    if have == want:
        return []
    proj = params["patch_embed"]["proj"]
    kernel = resample_patches(np.asarray(proj["kernel"], np.float32), want)
    params["patch_embed"] = {"proj": {**proj, "kernel": kernel}}
    return [f"first layer resampled from patches of {have} to {want} pixels"]


def _fit_positions(params: dict[str, Any], old, model) -> list[str]:
    """Resize the position embedding to the model's grid; return the note on it."""
    if old.grid_size == model.grid_size:
        return []
    prefix = old.num_prefix_tokens if old.class_position else 0
    resize = jax.jit(resize_pos_embed, static_argnums=(1, 2, 3))
    resized = resize(jnp.asarray(params["pos_embed"]), prefix, model.grid_size, old.grid_size)
    params["pos_embed"] = np.asarray(resized)
    grids = ("x".join(map(str, grid)) for grid in (old.grid_size, model.grid_size))
    return [f"position embedding resized from {' to '.join(grids)}"]


def _fit_class_position(params: dict[str, Any], old, model) -> list[str]:
    """Give the class and distillation tokens positions, or take them; the logits stay the same."""
    if old.class_position == model.class_position:
        return []
    positions, prefix = np.asarray(params["pos_embed"]), old.num_prefix_tokens
    if model.class_position:
        own = np.zeros((1, prefix, positions.shape[-1]), positions.dtype)
        params["pos_embed"] = np.concatenate([own, positions], axis=1)
        return ["the class token's position is zero: it had none"]
    for index, name in enumerate(("cls_token", "dist_token")[:prefix]):
        params[name] = np.asarray(params[name]) + positions[:, index : index + 1]
    params["pos_embed"] = positions[:, prefix:]
    return ["the class token's position was added to the token"]


def _fit_tokens(params: dict[str, Any], old, model, head: str, seed: int) -> list[str]:
    """Drop the distillation token, or start one, as the model asks; return the note on it."""
    if old.distilled == model.distilled:
        return []
    if head == "error":
        have, want = ("distilled", "plain")[:: 1 if old.distilled else -1]
        raise ValueError(
            f"{have} weights, {want} model: head='cls' keeps the class head and "
            f"{'drops the distillation token' if old.distilled else 'starts a distillation token'}"
        )
    positions = np.asarray(params["pos_embed"])
    if old.distilled:
        del params["dist_token"]
        params.pop("head_dist", None)
        params["pos_embed"] = np.delete(positions, 1, axis=1) if old.class_position else positions
        return ["distillation token and head dropped"]
    fresh = init_variables(model, seed, only=("dist_token", "head_dist", "pos_embed"))["params"]
    if model.class_position:
        fresh["pos_embed"] = np.insert(positions, 1, fresh["pos_embed"][:, 1], axis=1)
    params |= fresh
    return ["distillation token and head start anew"]


def init_variables(model, seed: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return random variables, of the parameters perhaps `only` some."""
    size = getattr(model, "image_size", 64)  # a convnet takes any size

    def init(key):
        variables = model.init(key, jnp.zeros(input_shape(model, size)))
        params = {k: v for k, v in variables["params"].items() if not only or k in only}
        return {**variables, "params": params}

    return jax.device_get(jax.jit(init)(jax.random.key(seed)))


def check_shapes(variables: dict[str, Any], old, model) -> None:
    """Raise ValueError with the first misfits unless the model takes these variables."""
    have = dict(torch_names.leaves(variables))
    want = {path: leaf.shape for path, leaf in torch_names.leaves(torch_names.shapes(model))}
    torch_names.check(have, want, {})
    # The only part of an architecture that no shape shows.
    if getattr(old, "num_heads", None) != getattr(model, "num_heads", None):
        raise ValueError(f"weights of {old.num_heads} heads of attention, not {model.num_heads}")
