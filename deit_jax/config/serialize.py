"""What the software asks of a config beyond its types, and the config's form on disk."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from deit_jax import sharding
from deit_jax.data.augment import make_augment
from deit_jax.errors import UserError
from deit_jax.models import cudnn, registry
from deit_jax.ranges import OPTIONAL, RANGES

# Fields that may differ between a run and its continuation: they change no number it computes.
# So do those of the mesh, and which kernels compute, but for rounding.
HARMLESS = (
    "data.dir",
    "data.prefetch_batches",
    "data.threads",
    "mesh.data",
    "mesh.fsdp",
    "mesh.slices",
    "mesh.tensor",
    "model.attention",
    "teacher.model.attention",
    "teacher.tape_path",
    "teacher.tape_top_k",
    "train.deterministic",
    "train.eval_batch_size",
    "train.eval_every_epochs",
    "train.keep_checkpoints",
    "train.micro_batch",
    "train.log_every_steps",
    "train.save_every_epochs",
)
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "data.decoder": ("auto", "fast", "portable", "pillow"),
    "augment.crop": ("random_resized", "simple"),
    "init.head": ("error", "drop", "cls"),
    "loss.kind": ("softmax", "binary"),
    "loss.heads": ("cls", "both"),
    "distill.kind": ("none", "soft", "hard"),
    "distill.reduction": ("batchmean", "numel"),
    "teacher.tape": ("off", "record", "replay"),
    "optim.name": ("adamw", "sgd", "lamb"),
    "train.on_divergence": ("stop", "rollback"),
}


def flatten(config) -> dict[str, Any]:
    """Return {"optim.lr": 0.001, …}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def validate(config: ConfigDict, num_devices: int) -> None:
    """Raise UserError naming the first key whose value is out of range or contradicts another."""
    flat = flatten(config)
    for key in (*CHOICES, *RANGES):
        if key not in flat:
            raise UserError(f"config.{key}: no such field here; configs/base.py lists them all")

    def check(ok: bool, key: str, remedy: str) -> None:
        if not ok:
            raise UserError(f"config.{key}={flat[key]!r}: {remedy}")

    for key, choices in CHOICES.items():
        check(flat[key] in choices, key, f"choose one of {', '.join(choices)}")
    for key, allowed in RANGES.items():
        unset = flat[key] is None and key in OPTIONAL
        check(unset or allowed.holds(flat[key]), key, str(allowed))
    _check_images(config, check)
    _check_batches(config, num_devices, check)
    _check_devices(config, check)
    check(
        config.loss.kind == "softmax" or config.loss.smoothing == 0,
        "loss.smoothing",
        "must be 0 with loss.kind=binary, where it would make every class a target",
    )
    if config.loss.heads == "both":
        model = build_model(config.model, num_classes=2)
        two = getattr(model, "distilled", False) and model.dist_head
        check(
            two,
            "loss.heads",
            f"{config.model.name} has no distillation head; take a distilled model",
        )
        check(
            config.distill.kind == "none",
            "loss.heads",
            "with a teacher the distillation head learns from it; set config.distill.kind=none",
        )
    check(
        bool(config.init.weights) or not config.init.required,
        "init.weights",
        "this config starts from trained weights: give a run's workdir or a weight file",
    )
    _check_tape(config, check)
    check(
        config.distill.kind == "none"
        or bool(config.teacher.weights)
        or config.teacher.epochs > 0
        or config.teacher.tape == "replay",
        "teacher.weights",
        "distillation needs a teacher: give the workdir of one trained by `deit train`, or train "
        "one first with --config.teacher.epochs=N",
    )


def _check_tape(config: ConfigDict, check) -> None:
    check(
        config.teacher.tape == "off" or config.distill.kind != "none",
        "teacher.tape",
        "a label tape is of a teacher; set config.distill.kind, or leave it off",
    )
    check(
        config.teacher.tape != "replay" or bool(config.teacher.tape_path),
        "teacher.tape_path",
        "replaying needs the directory of a label tape, as `deit tape record` makes one",
    )


def _check_images(config: ConfigDict, check) -> None:
    for key in ("crop_scale", "crop_ratio"):
        first, second = config.augment[key]
        check(first <= second, f"augment.{key}", "the smaller number must come first")
    for key in ("mixup_alpha", "cutmix_alpha"):
        value = config.mixing[key]
        check(value == 0 or value >= 0.001, f"mixing.{key}", "must be 0, or at least 0.001")
    try:
        make_augment(config.augment.auto, config.augment.color_jitter)
    except ValueError as error:
        raise UserError(f"config.augment.auto={config.augment.auto!r}: {error}") from error


def _check_batches(config: ConfigDict, num_devices: int, check) -> None:
    batch, accum, group = config.batch_size, config.optim.accum_steps, config.mixing.group_size
    data, fsdp, _ = sharding.mesh_sizes(config.mesh, num_devices)
    shares = f"mesh.data={data} x mesh.fsdp={fsdp}"
    check(
        batch % (data * fsdp * accum) == 0,
        "batch_size",
        f"must be a multiple of {shares} x optim.accum_steps={accum}",
    )
    check(
        config.train.eval_batch_size % (data * fsdp) == 0,
        "train.eval_batch_size",
        f"must be a multiple of {shares}",
    )
    if config.mixing.prob > 0 and (config.mixing.mixup_alpha or config.mixing.cutmix_alpha):
        check(
            batch % group == 0,
            "mixing.group_size",
            f"must divide batch_size={batch}; change either",
        )
        least = 2 * config.augment.repeats
        check(
            group % 2 == 0 and group >= least,
            "mixing.group_size",
            f"must be even and at least 2 x augment.repeats = {least}, so that no image meets its "
            "own copy",
        )


def _check_devices(config: ConfigDict, check) -> None:
    if without_bfloat16():
        check(
            config.dtype != "bfloat16",
            "dtype",
            f"this GPU (compute capability {cudnn.compute_capability()}) has no bfloat16 units; "
            "take float32",
        )
    teacher = [] if config.distill.kind == "none" else [(config.teacher.model, "teacher.")]
    for model_config, of in ((config.model, ""), *teacher):
        if model_config.attention == "cudnn":
            model = build_model(model_config, 2, config.dtype, of)
            reason = cudnn.refusal(model.attention_shape(batch=1), model.dtype)
            check(not reason, f"{of}model.attention", f"{reason}; take auto or xla")


def without_bfloat16() -> bool:
    """Return whether this machine's GPU is older than bfloat16 units: before Ampere."""
    capability = cudnn.compute_capability()
    return capability is not None and capability < cudnn.AMPERE


def compute_dtype(name: str) -> jnp.dtype:
    """Return the dtype that a config's `dtype` means on this machine."""
    if name == "auto":
        slow = jax.default_backend() == "cpu" or without_bfloat16()
        name = "float32" if slow else "bfloat16"
    return jnp.dtype(name)


def image_size(model_config) -> int:
    """Return the side in pixels of the images that a `config.model` takes."""
    return model_config.image_size or _spec(model_config.name).image_size


def build_model(
    model_config, num_classes: int, dtype: str = "float32", of: str = "", **kwargs: Any
):
    """Build the Flax module that a `config.model` describes; None fields stay the name's own.

    Raise UserError for an unknown name, fields that it does not have or values that they cannot
    have; `of` is "teacher." if the config is that of the teacher.
    """
    fields = {f.name for f in dataclasses.fields(_spec(model_config.name, of).cls)}
    overrides = {k: v for k, v in model_config.items() if k != "name" and v is not None}
    if "image_size" not in fields:  # a convnet takes any size
        overrides.pop("image_size", None)
    try:
        return registry.create_model(
            model_config.name, num_classes, dtype=compute_dtype(dtype), **overrides, **kwargs
        )
    except ValueError as error:
        raise UserError(f"config.{of}{error}") from error


def for_counting(model):
    """Return a model to count parameters or products of, whose attention asks no GPU for cuDNN."""
    return model.clone(attention="xla") if hasattr(model, "attention") else model


def _spec(name: str, of: str = "") -> registry.ModelSpec:
    try:
        return registry.get_spec(name)
    except ValueError as error:
        raise UserError(f"config.{of}model.name={name}: {error}") from error


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Return plain nested dicts and lists with every reference resolved."""
    return json.loads(json.dumps(config.copy_and_resolve_references().to_dict()))


def from_json(values: dict[str, Any]) -> ConfigDict:
    """Return a config from `to_json`'s form; lists become tuples, as configs hold them."""

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ConfigDict(tuples(values))


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Return {key: "key: old -> new"} for each field that matters and differs.

    A field that `old` is too old to have is no difference where it has its default value.
    """
    old, new, defaults = flatten(old), flatten(new), _defaults()
    found = {}
    for key in sorted(old.keys() | new.keys()):
        before = old.get(key, defaults.get(key, "(no such field)"))
        after = new.get(key, "(no such field)")
        if key == "teacher.tape" and _same_bits(before, after, new):
            continue
        if before != after and key not in HARMLESS and not key.startswith("mesh."):
            found[key] = f"{key}: {before} -> {after}"
    return found


def _same_bits(before: str, after: str, config: dict[str, Any]) -> bool:
    """Return whether another use of the label tape trains the same: a tape of logits is rounded."""
    return config["distill.kind"] == "hard" or "replay" not in (before, after)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for each field that matters and differs."""
    return list(changes(old, new).values())


def _defaults() -> dict[str, Any]:
    """Return the fields of configs/base.py; none if only the package is installed."""
    try:
        from configs import base
    except ImportError:
        return {}
    return flatten(to_json(base.get_config()))


def read_json(path: Path, kind: type = dict) -> Any:
    """Return a JSON file's content, a dict or a list; raise UserError if it is damaged."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: holds no {kind.__name__}; restore it from a copy")
    return value


def check_unchanged(config: ConfigDict, path: Path, allowed: Iterable[str] = ()) -> list[str]:
    """Raise UserError with the difference if the config saved at `path` is another run's.

    Return the differences in fields whose change is `allowed`.
    """
    changed = changes(read_json(path), to_json(config))
    for key in allowed:
        if key not in flatten(config):
            raise UserError(f"--allow-config-change={key}: no such field in configs/base.py")
    refused = {key: text for key, text in changed.items() if key not in allowed}
    if refused:
        raise UserError(
            f"{path.parent} holds a run with another config ({'; '.join(refused.values())}): "
            "restore these values, choose a new --workdir, or go on all the same with "
            f"--allow-config-change={','.join(refused)}"
        )
    return list(changed.values())
