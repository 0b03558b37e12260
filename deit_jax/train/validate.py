"""Checks that no single room can make: fields in range, and fit for each other."""

import inspect
from typing import Any

from ml_collections import ConfigDict

from deit_jax.config.schema import CHOICES, INT32, OPTIONAL, RANGES
from deit_jax.config.serialize import flatten
from deit_jax.data.augment import make_augment
from deit_jax.data.balance import WEIGHTS
from deit_jax.data.class_weights import BALANCED
from deit_jax.data.decoders import DECODERS
from deit_jax.data.order import whole_steps
from deit_jax.errors import UserError
from deit_jax.models import cudnn, vit
from deit_jax.models.build import build_model, in_channels, without_bfloat16
from deit_jax.parallel.sharding import mesh_sizes
from deit_jax.shapes import simplest, text
from deit_jax.step.distill.feature import FEATURE_LOSSES
from deit_jax.step.losses import LABEL_LOSSES
from deit_jax.step.objective import DISTILLATIONS, distillation
from deit_jax.step.optimizer import OPTIMIZERS
from deit_jax.storage import check_schemes
from deit_jax.train.teacher_spec import teacher_config
from deit_jax.train.validate_distill import check_distillation
from deit_jax.workdir.trackers import TRACKERS, named
from deit_jax.workdir.which import LATEST, parse_checkpoint


class Check:
    """A config's fields by their flat names, and the way to refuse one."""

    def __init__(self, flat: dict[str, Any]):
        self._flat = flat

    def __getitem__(self, key: str) -> Any:
        return self._flat[key]

    def __call__(self, ok: bool, key: str, remedy: str) -> None:
        """Raise UserError naming the field, its value and the remedy unless all is well."""
        if not ok:
            raise UserError(f"config.{key}={self._flat[key]!r}: {remedy}")


def validate(config: ConfigDict, num_devices: int) -> None:
    """Raise UserError naming the first key whose value is out of range or contradicts another."""
    flat = flatten(config)
    choices_of = CHOICES | {
        "data.balance": ("none", *WEIGHTS),
        "data.decoder": ("auto", *reversed(DECODERS)),
        "distill.kind": ("none", *DISTILLATIONS),
        "distill.feature_loss": tuple(FEATURE_LOSSES),
        "loss.kind": tuple(LABEL_LOSSES),
        "optim.name": tuple(OPTIMIZERS),
    }
    for key in (*choices_of, *RANGES):
        if key not in flat:
            raise UserError(f"config.{key}: no such field here; configs/base.py lists them all")

    check = Check(flat)
    check_schemes((f"config.{key}", value) for key, value in flat.items())
    for key, choices in choices_of.items():
        check(flat[key] in choices, key, f"choose one of {', '.join(choices)}")
    for key, allowed in RANGES.items():
        unset = flat[key] is None and key in OPTIONAL
        check(unset or allowed.holds(flat[key]), key, str(allowed))
    bits = config.data.bits
    check(bits == 0 or bits > 8, "data.bits", "must be 0, or between 9 and 32")
    check(
        config.data.eval_split != ".",
        "data.eval_split",
        "evaluates all of a folder, also what is trained on: for `deit eval`; name another part",
    )
    _check_channels(config.data, config.augment, check)
    _check_images(config.augment, config.mixing, check)
    check_schedule(config.optim, config.optim.lr)
    _check_batches(mesh_sizes(config.mesh, num_devices), check)
    teacher = [] if config.distill.kind == "none" else [(config.teacher.model, "teacher.")]
    _check_devices(config.dtype, [(config.model, ""), *teacher], config.data.channels, check)
    check(
        config.loss.kind == "softmax" or config.loss.smoothing == 0,
        "loss.smoothing",
        "must be 0 with loss.kind=binary, where it would make every class a target",
    )
    _check_labels(check)
    _check_heads(config.model, config.loss.heads, config.distill.kind, config.data.channels, check)
    check(
        bool(config.init.weights) or not config.init.required,
        "init.weights",
        "this config starts from trained weights: give a run's workdir or a weight file",
    )
    _check_names(check)
    model = build_model(config.model, 2, channels=config.data.channels)
    check_distillation(config.distill, config.teacher, model, check)
    _check_tape(config.teacher, config.distill.kind, config.data.multi_label, check)
    check(
        config.distill.kind == "none"
        or bool(config.teacher.weights)
        or config.teacher.epochs > 0
        or config.teacher.tape == "replay",
        "teacher.weights",
        "distillation needs a teacher: give the workdir of one trained by `deit train`, or train "
        "one first with --config.teacher.epochs=N",
    )


def check_schedule(optim, lr: float, key: str = "optim.lr") -> None:
    """Raise UserError if a learning rate climbs where it should fall; `key` is the peak's name."""
    for name, when in (("min_lr", "at the end"), ("warmup_lr", "before the warm-up")):
        used = name == "min_lr" or optim.warmup_epochs > 0
        if used and optim[name] > lr and not optim.may_rise:
            raise UserError(
                f"config.optim.{name}={optim[name]:g}: the rate {when} is above its peak, "
                f"config.{key}={lr:g}, which follows batch_size unless it is given; lower {name} "
                f"to {lr:g} or less, or allow it with --config.optim.may_rise=True"
            )


def _check_heads(model_config, heads: str, kind: str, channels: int, check: Check) -> None:
    """Check that both heads can learn the labels where that is asked for."""
    if heads != "both":
        return
    model = build_model(model_config, 2, channels=channels)
    two = getattr(model, "distilled", False) and model.dist_head
    check(
        two,
        "loss.heads",
        f"{model_config.name} has no distillation head; take a distilled model",
    )
    check(
        kind == "none",
        "loss.heads",
        "with a teacher the distillation head learns from it; set config.distill.kind=none",
    )


def _check_labels(check: Check) -> None:
    """Check what is asked of images of several labels, and of classes of unequal size."""
    balance, kind, several = check["data.balance"], check["loss.kind"], check["data.multi_label"]
    check(
        kind == "binary" or not several,
        "loss.kind",
        "one label an image; data.multi_label=True takes loss.kind=binary, loss.smoothing=0",
    )
    check(
        balance == "none" or not several,
        "data.balance",
        "images of several labels cannot be shared out by class; take loss.class_weights instead",
    )
    distill = check["distill.kind"]
    check(
        distill == "none" or distillation(distill, several) is not None,
        "distill.kind",
        "knows no images of several labels; leave config.data.multi_label out",
    )
    if not check["loss.class_weights"]:
        return
    check(
        check["loss.class_weights"] != BALANCED or balance == "none",
        "loss.class_weights",
        f"data.balance={balance} meets small classes more often already; take one of "
        "the two, or give numbers",
    )
    check(
        "weights" in inspect.signature(LABEL_LOSSES[kind]).parameters,
        "loss.class_weights",
        f"loss.kind={kind} knows no weights of classes; leave it out",
    )


def _check_names(check: Check) -> None:
    """Check which trackers are meant, which weights of other runs, and that these are used."""
    unknown = set(named(check["train.trackers"])) - set(TRACKERS)
    check(not unknown, "train.trackers", f"takes any of {', '.join(TRACKERS)}")
    trained_first = check["teacher.epochs"] > 0 and check["teacher.tape"] != "replay"
    known = check["distill.kind"] != "none" and bool(check["teacher.weights"])
    chosen_from = {
        "init.checkpoint": bool(check["init.weights"]),
        "init.ema": bool(check["init.weights"]),
        "teacher.checkpoint": known or (check["distill.kind"] != "none" and trained_first),
        "teacher.ema": known,  # a teacher that is trained first has none
    }
    for key, there in chosen_from.items():
        group, field = key.split(".")
        if field == "checkpoint":
            try:
                parse_checkpoint(check[key])
            except UserError as error:
                raise UserError(f"config.{group}.{error}") from None
        check(
            there or check[key] in (LATEST, False),
            key,
            f"there is no config.{group}.weights that it could be of; give it, or leave this out",
        )


def _check_tape(teacher, kind: str, several: bool, check: Check) -> None:
    form = distillation(kind, several)
    recordable = kind == "none" or (form is not None and form.tape is not None)
    of = " of several labels an image" if several else ""
    check(
        teacher.tape == "off" or recordable,
        "teacher.tape",
        f"what distill.kind={kind} learns{of} cannot be recorded; leave it off",
    )
    check(
        teacher.tape == "off" or kind != "none",
        "teacher.tape",
        "a label tape is of a teacher; set config.distill.kind, or leave it off",
    )
    check(
        teacher.tape != "replay" or bool(teacher.tape_path),
        "teacher.tape_path",
        "replaying needs the directory of a label tape, as `deit tape record` makes one",
    )


def _check_channels(data, augment, check: Check) -> None:
    count = data.channels
    example = "'(0.449,)' and '(0.226,)'" if count == 1 else "'(0.5,)' and '(0.25,)'"
    for key in ("mean", "std"):
        check(
            len(data[key]) in (1, count),
            f"data.{key}",
            f"these are {len(data[key])}, and data.channels={count}; give one for each channel, or "
            f"one for all: --config.data.mean and --config.data.std, as in {example}",
        )
    check(
        count in (1, 3) or not augment.auto,
        "augment.auto",
        f"is for colours or grey, and data.channels={count}; set --config.augment.auto=''",
    )
    jitters = augment.color_jitter and augment.auto.split("-")[0] != "rand"
    check(
        count in (1, 3) or not jitters,
        "augment.color_jitter",
        f"is for colours or grey, and data.channels={count}; set it to 0",
    )


def _check_images(augment, mixing, check: Check) -> None:
    for key in ("crop_scale", "crop_ratio"):
        first, second = augment[key]
        check(first <= second, f"augment.{key}", "the smaller number must come first")
    for key in ("mixup_alpha", "cutmix_alpha"):
        value = mixing[key]
        check(value == 0 or value >= 0.001, f"mixing.{key}", "must be 0, or at least 0.001")
    try:
        make_augment(augment.auto, augment.color_jitter)
    except ValueError as error:
        raise UserError(f"config.augment.auto={augment.auto!r}: {error}") from error


def _check_batches(sizes: tuple[int, int, int], check: Check) -> None:
    batch, accum = check["batch_size"], check["optim.accum_steps"]
    group, (data, fsdp, _) = check["mixing.group_size"], sizes
    shares = f"mesh.data={data} x mesh.fsdp={fsdp}"
    check(
        batch % (data * fsdp * accum) == 0,
        "batch_size",
        f"must be a multiple of {shares} x optim.accum_steps={accum}",
    )
    check(
        check["train.eval_batch_size"] % (data * fsdp) == 0,
        "train.eval_batch_size",
        f"must be a multiple of {shares}",
    )
    mixes = check["mixing.mixup_alpha"] or check["mixing.cutmix_alpha"]
    if check["mixing.prob"] > 0 and mixes:
        check(
            batch % group == 0,
            "mixing.group_size",
            f"must divide batch_size={batch}; change either",
        )
        least = 2 * check["augment.repeats"]
        check(
            group % 2 == 0 and group >= least,
            "mixing.group_size",
            f"must be even and at least 2 x augment.repeats = {least}, so that no image meets its "
            "own copy",
        )


def _check_devices(dtype: str, models: list, channels: int, check: Check) -> None:
    if without_bfloat16():
        check(
            dtype != "bfloat16",
            "dtype",
            f"this GPU (compute capability {cudnn.compute_capability()}) has no bfloat16 units; "
            "take float32",
        )
    for model_config, of in models:
        in_channels(model_config, channels, of)
        if model_config.attention == "cudnn":
            model = build_model(model_config, 2, dtype, of, channels)
            reason = cudnn.refusal(model.attention_shape(batch=1), model.dtype)
            check(not reason, f"{of}model.attention", f"{reason}; take auto or xla")


def check_length(epochs: dict[str, float], batch_size: int, num_images: int) -> None:
    """Raise UserError if a run would take more steps than can be counted.

    `epochs` are those of student and teacher, by the names of their fields.
    """
    per_epoch = max(1, num_images // batch_size)
    for key, count in epochs.items():
        if (steps := whole_steps(count, per_epoch)) > INT32:
            raise UserError(
                f"config.{key}={count}: these are {steps} steps of {batch_size} images; lower it, "
                f"there can be {INT32} at most"
            )


def check_teacher(config: ConfigDict, num_devices: int) -> None:
    """Raise UserError, before anything is trained, if `config.teacher` cannot be."""
    if config.distill.kind == "none":
        return
    channels = config.data.channels
    build_model(config.teacher.model, 2, of="teacher.", channels=channels)
    if config.teacher.weights or config.teacher.tape == "replay":
        return
    own = teacher_config(config)
    check_schedule(own.optim, own.optim.lr, "teacher.lr")
    validate(own, num_devices)
    model = build_model(own.model, 2, of="teacher.", channels=channels)
    size, given = own.model.image_size, config.teacher.model.image_size
    for key, value, fixed in (
        ("teacher.model.image_size", given, True),
        ("teacher.image_size", config.teacher.image_size, isinstance(model, vit.VisionTransformer)),
    ):
        if value is not None and simplest(value) != size and fixed:
            raise UserError(
                f"config.{key}={value}: a teacher that is trained first is trained on the "
                f"student's images, of {text(size)} pixels; leave it out, or give "
                "config.teacher.weights"
            )
