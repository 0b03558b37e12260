"""Choices and ranges of a config's fields, and which of them a resume may change.

Models check their own fields themselves; of a registry's members its own room knows.
"""

import dataclasses

# Fields that may differ between a run and its continuation: they change no number it computes.
# So do those of the mesh, and which kernels compute, but for rounding.
MAY_CHANGE = (
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
    "train.trackers",
)
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "data.resize": ("crop", "squash", "pad"),
    "augment.crop": ("random_resized", "simple"),
    "data.nested": ("auto", "leaf", "top", "path"),
    "init.head": ("error", "drop", "cls"),
    "loss.heads": ("cls", "both"),
    "distill.reduction": ("batchmean", "numel"),
    "distill.student_features": ("token", "cls", "patches"),
    "teacher.combine": ("logits", "votes"),
    "optim.tune": ("all", "linear_probe", "attention_only"),
    "teacher.tape": ("off", "record", "replay"),
    "train.on_divergence": ("stop", "rollback"),
}

INT32 = 2**31 - 1  # what the step and the counters are
ANY = 0  # length of a tuple
LARGE = 1e6  # for what has no limit but float32's, which its products must not reach either


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two bounds; `above` and `below` leave the bounds themselves out.

    `length` is that of a tuple of such numbers, ANY for one of any length, None for a single one.
    """

    low: int | float
    high: int | float
    above: bool = False
    below: bool = False
    length: int | None = None

    def holds(self, value) -> bool:
        """Return whether a number, or each of a tuple, is in the range; nan never is."""
        if self.length is not None:
            return (
                isinstance(value, tuple)
                and self.length in (len(value), ANY)
                and len(value) > 0
                and all(map(self._holds, value))
            )
        return self._holds(value)

    def _holds(self, value) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = (str(x) if isinstance(x, int) else f"{x:g}" for x in (self.low, self.high))
        length = "one or more" if self.length == ANY else self.length
        many = "" if self.length is None else f"{length} numbers, each "
        if not (self.above or self.below):
            return f"must be {many}between {low} and {high}"
        above = f"greater than {low}" if self.above else f"at least {low}"
        below = f"below {high}" if self.below else f"at most {high}"
        return f"must be {many}{above} and {below}"


@dataclasses.dataclass(frozen=True)
class Sides(Range):
    """A size of images: a whole number of pixels, or two, (height, width)."""

    def holds(self, value) -> bool:
        """Return whether a value is such a size."""
        several = isinstance(value, tuple) and len(value) == 2
        return all(
            isinstance(side, int) and self._holds(side) for side in (value if several else (value,))
        )

    def __str__(self) -> str:
        return f"must be a whole number between {self.low} and {self.high}, or (height, width)"


_COUNT = Range(1, INT32)
_BATCH = Range(1, 2**24)
_WEIGHT = Range(0, 1000)
_EPOCHS = Range(0, LARGE, above=True)
_FRACTION = Range(0, 1)
_NOT_QUITE_ONE = Range(0, 1, below=True)
_SIZE = Range(0, LARGE)
_SIDES = Sides(1, 2**14)
_AXIS = Range(-1, INT32)  # more is asked of it in sharding.py

RANGES = {
    "seed": Range(0, 2**32 - 1),  # Grain's
    "epochs": _EPOCHS,
    "batch_size": _BATCH,
    "data.eval_fraction": _FRACTION,
    "data.min_images": Range(0, INT32),
    "data.rules": Range(1, 2),
    "data.channels": Range(1, 512),
    "data.mean": Range(0, 1, length=ANY),
    "data.std": Range(0.001, 1, length=ANY),
    "data.eval_crop_ratio": Range(0.1, 1),  # below, a photograph is enlarged to gigabytes
    "data.bits": Range(0, 32),  # and not 1 … 8: validate.py
    "data.threads": Range(0, 1024),
    "data.prefetch_batches": Range(1, 1024),
    "augment.crop_scale": Range(0, 1, above=True, length=2),
    "augment.crop_ratio": Range(0.001, 1000, length=2),
    "augment.flip_prob": _FRACTION,
    "augment.color_jitter": Range(0, 10),
    "augment.repeats": _BATCH,
    "augment.erase_prob": _FRACTION,
    "mixing.prob": _FRACTION,
    "mixing.mixup_alpha": Range(0, 1000),
    "mixing.cutmix_alpha": Range(0, 1000),
    "mixing.switch_prob": _FRACTION,
    "mixing.group_size": _BATCH,
    "loss.smoothing": _FRACTION,
    "distill.alpha": _FRACTION,
    "distill.tau": Range(0.001, 1000),
    "distill.label_weight": _WEIGHT,
    "distill.teacher_weight": _WEIGHT,
    "distill.feature_weight": _WEIGHT,
    "teacher.epochs": _SIZE,
    "teacher.image_size": _SIDES,
    "teacher.lr": _SIZE,
    "teacher.tape_top_k": _COUNT,
    "teacher.model.image_size": _SIDES,
    "teacher.model.in_channels": Range(1, 512),
    "model.image_size": _SIDES,
    "model.in_channels": Range(1, 512),
    "optim.lr": _SIZE,
    "optim.warmup_lr": _SIZE,
    "optim.warmup_epochs": _SIZE,
    "optim.min_lr": _SIZE,
    "optim.weight_decay": _SIZE,
    "optim.b1": _NOT_QUITE_ONE,
    "optim.b2": _NOT_QUITE_ONE,
    "optim.eps": Range(1e-30, 1),  # a 0 of float32 would divide 0 by 0 where a gradient vanishes
    "optim.clip_norm": _SIZE,
    "optim.layer_decay": Range(0, 1, above=True),
    "optim.accum_steps": _BATCH,
    "train.micro_batch": Range(0, INT32),
    "optim.ema_decay": _NOT_QUITE_ONE,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.slices": _AXIS,
    "train.log_every_steps": _COUNT,
    "train.eval_every_epochs": _EPOCHS,
    "train.save_every_epochs": _EPOCHS,
    "train.patience_epochs": _SIZE,
    "train.keep_checkpoints": _COUNT,
    "train.eval_batch_size": _BATCH,
    "train.max_bad_steps": Range(0, INT32),
    "train.max_rollbacks": Range(0, INT32),
}
OPTIONAL = (
    "data.rules",
    "distill.label_weight",
    "distill.teacher_weight",
    "model.image_size",
    "model.in_channels",
    "teacher.image_size",
    "teacher.model.image_size",
    "teacher.model.in_channels",
    "train.micro_batch",
)
