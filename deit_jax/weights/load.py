"""Weights from anywhere, and what they say about themselves, fitted to the model asked for.

A source is a file (.pth, .safetensors), a Hugging Face or timm folder, the workdir of a run or
`hf-hub:ORG/NAME`. dialects knows the names in the files, weight_files their bytes.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax import checkpoint, dialects, weight_files
from deit_jax import config as config_lib
from deit_jax.claims import DISBELIEF, Claims, in_one_line, read_claims
from deit_jax.dialects import from_torch, to_torch
from deit_jax.errors import UserError
from deit_jax.models import registry
from deit_jax.models.conv import fold_batch_norm
from deit_jax.pos_embed import resize_pos_embed

__all__ = ["from_torch", "load", "load_variables", "open_model", "to_torch"]

HUB = "hf-hub:"
HEAD_POLICIES = {
    "error": "refuse weights whose heads or number of classes differ",
    "drop": "start all heads anew",
    "cls": "keep the class head alone; a distillation token that the weights lack starts anew",
}
_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
_IN_CLAIMS = ("format", "classes", "image_size", "mean", "std", "crop_ratio")
_HEADS = ("head", "head_dist", "classifier")
_HUB_FILES = ("config.json", "preprocessor_config.json")


class WeightsError(UserError, ValueError):
    """Weights that cannot be used as asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """Weights with the model that they fit, and the input that they expect.

    `format` says what the source is, `notes` what was changed on the way in, `run` is the training
    run if it is one.
    """

    source: str
    format: str
    name: str
    model: Any
    variables: dict[str, Any]
    classes: list[str]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_ratio: float
    notes: tuple[str, ...] = ()
    run: checkpoint.Run | None = None


def load(
    name: str | None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    head: str = "error",
) -> tuple[Any, dict[str, Any]]:
    """Return (model, params) for `model.apply({"params": params}, images, train=False)`.

    Without weights the params are random (seed 0). Without a name, as in `load("runs/mine")`, the
    model is the weights' own; so are the number of classes and the image size that are not given.
    A convnet comes with its batch norm folded into the convolutions. `head` is one of
    HEAD_POLICIES.
    """
    if weights is None and name not in registry.SPECS and Path(str(name)).exists():
        name, weights = None, name  # load("runs/mine")
    if weights is not None:
        opened = load_variables(weights, name, num_classes, image_size, head)
        return folded(opened.model, opened.variables)
    model = registry.create_model(name, 1000 if num_classes is None else num_classes)
    if image_size is not None and hasattr(model, "image_size"):
        model = model.clone(image_size=image_size)
    return folded(model, _init(model, 0))


def folded(model, variables: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a model and its params for inference: no batch norm is left. By one program."""
    if not variables.get("batch_stats"):
        return model, jax.tree.map(jnp.asarray, variables["params"])
    fold = jax.jit(functools.partial(fold_batch_norm, epsilon=model.bn_epsilon))
    return model.clone(folded=True), fold(variables)


def open_model(
    source: str | Path, model: str | None = None, *, default=None, dtype: str = "float32"
) -> Opened:
    """Return weights as they are, with their own classes and image size.

    `model` is their registered name where they do not say it; `default` a name or config.model for
    weights that neither say it nor have the shapes of one registered model.
    """
    return load_variables(source, model, default=default, dtype=dtype)


def load_variables(
    source: str | Path,
    model=None,
    num_classes: int | None = None,
    image_size: int | None = None,
    head: str = "error",
    *,
    ema: bool = False,
    default=None,
    seed: int = 0,
    dtype: str = "float32",
) -> Opened:
    """Return weights fitted to a model: a registered name, a config.model, or None, their own.

    Position embeddings are resized to the image size, what starts anew is drawn from `seed`, and
    the notes tell of both. `ema` takes the moving average of a run's weights. Raise WeightsError (a
    ValueError) with the names and shapes that do not fit.
    """
    if head not in HEAD_POLICIES:
        raise WeightsError(f"head={head!r}: choose one of {', '.join(HEAD_POLICIES)}")
    try:
        found = _open(str(source), model, default, head, dtype)
        found = _averaged(found) if ema else found
        target = _target(found, model, num_classes, image_size, head, dtype)
        size = getattr(target, "image_size", image_size or found.image_size)
        fitted = _fit(found, target, head, seed)
    except DISBELIEF as error:
        prefix = "" if str(error).startswith(str(source)) else f"{source}: "
        raise WeightsError(f"{prefix}{in_one_line(error)}") from error
    return dataclasses.replace(fitted, image_size=size, name=_name_of(model, fitted))


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


def _open(source: str, model, default, head: str, dtype: str) -> Opened:
    """Return the weights in their own model."""
    path = _locate(source)
    if path.is_dir() and not any((path / name).is_file() for name in _IN_FOLDER):
        return _open_run(source, path, model, dtype)
    claims, flat = read_claims(path), weight_files.read(path)
    name, overrides = _identify(flat, claims, model, default)
    variables = from_torch(flat, name, **overrides)
    classes = _num_classes(variables)
    model = registry.create_model(name, classes, dtype=config_lib.compute_dtype(dtype), **overrides)
    spec = registry.get_spec(name)
    known = claims.classes if claims.classes and len(claims.classes) == classes else None
    return Opened(
        source=source,
        format=claims.format,
        name=name,
        model=model,
        variables={"batch_stats": {}, **variables},
        classes=known or default_classes(classes),
        image_size=getattr(model, "image_size", claims.image_size or spec.image_size),
        mean=claims.mean or spec.mean,
        std=claims.std or spec.std,
        crop_ratio=claims.crop_ratio or spec.crop_ratio,
        notes=claims.notes,
    )


def _open_run(source: str, path: Path, model, dtype: str) -> Opened:
    if not (path / "classes.json").is_file():
        files = " or ".join(_IN_FOLDER)
        raise ValueError(f"neither the workdir of a `deit train` run nor a folder with {files}")
    try:
        run = checkpoint.load_run(path, dtype)
    except UserError as error:  # of its own config, which is not the one at hand
        raise ValueError(str(error)) from error
    _check_shapes(run.variables, run.model, run.model)
    name, data = run.config.model.name, run.config.data
    claims = Claims(
        format="deit_jax run",
        classes=run.classes,
        image_size=config_lib.image_size(run.config.model),
        mean=data.mean,
        std=data.std,
        crop_ratio=data.eval_crop_ratio,
    )
    if isinstance(model, str) and model != name:
        raise ValueError(f"{source} holds the run of a {name}, not of a {model}")
    return Opened(
        source=source,
        name=name,
        model=run.model,
        variables=run.variables,
        run=run,
        **{key: getattr(claims, key) for key in _IN_CLAIMS},
    )


def _averaged(found: Opened) -> Opened:
    if found.run is None or found.run.ema is None:
        raise ValueError("has no moving average of its weights")
    return dataclasses.replace(found, variables=found.run.ema)


def _locate(source: str) -> Path:
    """Return where the weights lie, downloaded if they are on the Hugging Face hub."""
    if not source.startswith(HUB):
        if Path(source).exists():
            return Path(source)
        raise WeightsError(f"{source}: no such file or folder")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise WeightsError(f"{source}: needs pip install 'deit_jax[hub]'") from error
    repository, _, revision = source.removeprefix(HUB).partition("@")
    try:
        for name in _IN_FOLDER:  # older repositories hold the same weights twice
            folder = Path(
                huggingface_hub.snapshot_download(
                    repository, revision=revision or None, allow_patterns=[name, *_HUB_FILES]
                )
            )
            if (folder / name).exists():
                break
    except Exception as error:  # the client's own, its HTTP library's and the operating system's
        reason = " ".join(str(error).split())
        raise WeightsError(f"{source}: cannot be downloaded ({reason:.300})") from error
    return folder


def _identify(flat, claims: Claims, model, default) -> tuple[str, dict[str, Any]]:
    """Return the registered name and the overrides of the model that tensors belong to."""
    name, overrides = _described(model)
    name = name or claims.name
    if name is None:
        names = dialects.candidates(flat)
        if len(names) > 1:
            raise ValueError(f"may be {' or '.join(names)}; say which with --model")
        name, overrides = (names[0], {}) if names else _described(default)
    if name is None:
        fields = ", ".join(f"{k}={v}" for k, v in dialects.transformer_fields(flat).items())
        raise ValueError(f"no registered model has these shapes ({fields}); name one with --model")
    if name == claims.name:
        overrides = dict(claims.overrides)
    if "grid" in (fields := dialects.transformer_fields(flat)):
        own = registry.create_model(name, **overrides)
        heads = claims.overrides.get("num_heads", getattr(own, "num_heads", None))
        if heads != getattr(own, "num_heads", None):
            raise ValueError(f"has {heads} heads of attention, {name} has {own.num_heads}")
        if hasattr(own, "distilled"):
            overrides |= {k: fields[k] for k in ("distilled", "dist_head") if k in fields}
            if own.grid_size != fields["grid"]:
                overrides["image_size"] = fields["grid"] * own.patch_size
    return name, overrides


def _described(model) -> tuple[str | None, dict[str, Any]]:
    """Return the name and the overrides in a name, a config.model or None."""
    if model is None or isinstance(model, str):
        return model, {}
    built = config_lib.build_model(model, 1)
    return model.name, architecture(built, model.name)


def _num_classes(variables: dict[str, Any]) -> int:
    (head,) = (variables["params"][k] for k in ("head", "classifier") if k in variables["params"])
    return head.get("fc", head)["kernel"].shape[-1]


def _target(found: Opened, model, num_classes, image_size, head: str, dtype: str):
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
        target = config_lib.build_model(model, classes, dtype)
    if image_size is not None and hasattr(target, "image_size"):
        target = target.clone(image_size=image_size)
    return target


def _name_of(model, fitted: Opened) -> str:
    """Return the name that was asked for, or else the weights' own with or without `_distilled`."""
    if model is not None:
        return model if isinstance(model, str) else model.name
    name, distilled = fitted.name, getattr(fitted.model, "distilled", False)
    twin = name.replace("_distilled", "")
    twin = twin.replace("_patch", "_distilled_patch") if distilled else twin
    return twin if twin in registry.SPECS else name


def _fit(found: Opened, model, head: str, seed: int) -> Opened:
    """Return the weights with the positions, tokens and heads of another model."""
    if model == found.model and head == "error":
        return found
    old, count = found.model, len(found.classes)
    params, notes, fresh = dict(found.variables["params"]), list(found.notes), set()
    if model.num_classes != count and head != "drop":
        raise ValueError(
            f"the weights know {count} classes, the model {model.num_classes}; head='drop' starts "
            "new heads"
        )
    if "pos_embed" in params and hasattr(model, "grid_size"):
        notes += _fit_positions(params, old, model)
        notes += _fit_tokens(params, old, model, head, seed)
    if head == "drop":
        fresh |= {name for name in _HEADS if name in params}
        notes.append(f"heads dropped: {count} -> {model.num_classes} classes")
    elif head == "cls" and "dist_token" in params and old.distilled:
        fresh.add("head_dist")
        notes.append("distillation head starts anew")
    if "dist_token" in params and not model.dist_head:
        params.pop("head_dist", None)
        fresh.discard("head_dist")
    elif "dist_token" in params and "head_dist" not in params and head != "error":
        fresh.add("head_dist")
    if fresh:
        params |= _init(model, seed, only=tuple(sorted(fresh)))["params"]
    variables = found.variables | {"params": params}
    _check_shapes(variables, old, model)
    same = model.num_classes == count and head != "drop"
    classes = found.classes if same else default_classes(model.num_classes)
    return dataclasses.replace(
        found, model=model, variables=variables, classes=classes, notes=tuple(notes)
    )


def _fit_positions(params: dict[str, Any], old, model) -> list[str]:
    """Resize the position embedding to the model's grid; return the note on it."""
    if old.grid_size == model.grid_size:
        return []
    prefix = old.num_prefix_tokens if old.class_position else 0
    resize = jax.jit(resize_pos_embed, static_argnums=(1, 2))
    resized = resize(jnp.asarray(params["pos_embed"]), prefix, model.grid_size)
    params["pos_embed"] = np.asarray(resized)
    grids = (f"{side}x{side}" for side in (old.grid_size, model.grid_size))
    return [f"position embedding resized from {' to '.join(grids)}"]


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
        del params["dist_token"], params["head_dist"]
        params["pos_embed"] = np.delete(positions, 1, axis=1) if old.class_position else positions
        return ["distillation token and head dropped"]
    fresh = _init(model, seed, only=("dist_token", "head_dist", "pos_embed"))["params"]
    if model.class_position:
        fresh["pos_embed"] = np.insert(positions, 1, fresh["pos_embed"][:, 1], axis=1)
    params |= fresh
    return ["distillation token and head start anew"]


def _init(model, seed: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return random variables, of the parameters perhaps `only` some."""
    size = getattr(model, "image_size", 64)  # a convnet takes any size

    def init(key):
        variables = model.init(key, jnp.zeros((1, size, size, 3)))
        params = {k: v for k, v in variables["params"].items() if not only or k in only}
        return {**variables, "params": params}

    return jax.device_get(jax.jit(init)(jax.random.key(seed)))


def _check_shapes(variables: dict[str, Any], old, model) -> None:
    """Raise ValueError with the first misfits unless the model takes these variables."""
    have = dict(dialects.leaves(variables))
    want = {path: leaf.shape for path, leaf in dialects.leaves(dialects.shapes(model))}
    dialects.check(have, want, {})
    # The only part of an architecture that no shape shows.
    if getattr(old, "num_heads", None) != getattr(model, "num_heads", None):
        raise ValueError(f"weights of {old.num_heads} heads of attention, not {model.num_heads}")
