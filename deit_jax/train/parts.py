"""Parts that a device takes its share of a batch in: for speed on TPUs, for memory on GPUs."""

import math
from collections.abc import Callable

from deit_jax.errors import UserError
from deit_jax.parallel import sharding
from deit_jax.shapes import sides
from deit_jax.train import memory
from deit_jax.train.memory import Load, Takes

# Attention weights in bfloat16 of so many bytes a layer still fit in a TPU core's own memory next
# to what else is there: 32 images of DeiT-B at 224 px (v5e, by XLA's estimate).
FAST_BYTES = 40e6
# What the teacher takes at a time: convolutions gain from more images. RegNetY-16GF, 128 images of
# 224 px on a v5e: 78 M cycles and 1.0 GB at once, 92 M and 0.6 GB in parts of 32.
TEACHER_PIXELS = 128 * 224**2


def choose(load: Load, accum_steps: int, micro_batch: int | None) -> tuple[int, int]:
    """Return in how many parts a device's share of the batch goes through student and teacher.

    `optim.accum_steps` and `train.micro_batch` say so. Without either a transformer has, on TPUs,
    the fewest parts of which one layer's attention weights fit into FAST_BYTES, on GPUs the fewest
    that fit into the memory, if the device tells how much it has. With batch norm and with dropout,
    which draws a number per activation, parts would be another computation: only accum_steps asks
    for that. The teacher then has as few as TEACHER_PIXELS or a GPU's memory allows; where parts
    were asked for, which saves memory, it has the student's.

    Raise UserError if not even one image fits, or if equal parts of about `train.micro_batch`
    images cannot be had.
    """
    model, share = load.model, load.share
    if accum_steps > 1:
        return accum_steps, accum_steps
    on_gpu = sharding.platform(load.mesh) == "gpu"
    parted = hasattr(model, "draw_scales") and not model.dropout
    if micro_batch == 0 or (micro_batch is not None and not parted):
        return 1, 1
    if micro_batch is not None:
        parts = _asked_for(share, micro_batch)
        return parts, parts
    if on_gpu:
        parts, teacher_parts = _fitting(load)
        return (parts if parted else 1), teacher_parts
    if not parted or sharding.platform(load.mesh) != "tpu":
        return 1, 1
    most = fast_images(model, load.mesh.shape["tensor"])
    parts = _fewest(share, lambda images: images <= most) or share
    # A share with no fitting divisor (74 = 2 x 37) is faster whole than in crumbs.
    parts = parts if 2 * (share // parts) >= most else 1
    return parts, _of_teacher(load, parts)


def _of_teacher(load: Load, parts: int) -> int:
    # Also behind a tape, which may have holes: as who recorded it took its answers.
    if parts == 1 or load.teacher_size is None:
        return parts
    most = max(1, TEACHER_PIXELS // math.prod(sides(load.teacher_size)))
    return min(parts, _fewest(load.share, lambda images: images <= most) or load.share)


def forward_parts(takes: Callable[[], Takes], image_bytes: int, share: int, mesh, held: int) -> int:
    """Return in how many parts a device predicts for its share, beside the bytes that it holds.

    `takes` tells what the answers take, `image_bytes` what an image does as it is loaded.
    """
    if (limit := memory.limit(mesh)) is None:
        return 1
    needed = takes()
    free = memory.USABLE * limit - held - image_bytes * share
    return _fewest(share, lambda images: needed.bytes(images) <= free) or share


def fast_images(model, tensor: int) -> int:
    """Return of how many images a layer's attention weights fit into FAST_BYTES."""
    tokens = model.num_patches + model.num_prefix_tokens
    padded = -(-tokens // 128) * 128  # a row of a TPU's registers
    return max(1, int(FAST_BYTES / (2 * model.num_heads / tensor * tokens * padded)))


def _asked_for(share: int, most: int) -> int:
    """Return the parts that `train.micro_batch` means."""
    parts = _fewest(share, lambda images: images <= most) or share
    if 2 * (share // parts) < min(most, share):
        larger = min(n for n in range(most, share + 1) if share % n == 0)
        raise UserError(
            f"config.train.micro_batch={most}: a device's share, {share} images, has no equal "
            f"parts of {(most + 1) // 2} to {most}; take {larger}, or another batch_size"
        )
    return parts


def _fitting(load: Load) -> tuple[int, int]:
    """Return the fewest parts, of student and teacher, that fit into the memory of GPUs."""
    if (limit := memory.limit(load.mesh)) is None:
        return 1, 1
    share, sums, student = load.share, load.gradient_bytes, load.gradient
    free = memory.USABLE * limit - load.held

    def fits(images: int) -> bool:
        return student.bytes(images) + (sums if images < share else 0) <= free

    parts, teacher_parts = _fewest(share, fits), 1
    # The estimate is on the safe side: what is refused is far from fitting.
    if parts is None and (needed := load.held + sums + student.bytes(1)) > limit:
        raise UserError(
            f"config.model.name={load.name}: a step takes about {needed / 1e9:.1f} GB of a "
            f"device with one image at a time, and it has {limit / 1e9:.1f} GB for it; try "
            "--config.model.remat=True, --config.mesh.fsdp=N over several devices, or a smaller "
            "--config.batch_size"
        )
    if load.teacher is not None:
        takes = memory.of_teacher(*load.teacher, load.image_size)
        teacher_parts = _fewest(share, lambda images: takes.bytes(images) <= free) or share
    return parts or share, teacher_parts


def _fewest(share: int, fits: Callable[[int], bool]) -> int | None:
    """Return the fewest equal parts whose images fit, None if none does."""
    divisors = (n for n in range(1, share + 1) if share % n == 0)
    return next((n for n in divisors if fits(share // n)), None)
