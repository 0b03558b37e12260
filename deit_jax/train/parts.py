"""In how many parts a device takes its share of a batch: for speed on TPUs, for memory on GPUs."""

import functools
import json
from collections.abc import Callable

from deit_jax import config as config_lib
from deit_jax import memory, sharding
from deit_jax.errors import UserError

# Attention weights in bfloat16 of so many bytes a layer still fit in a TPU core's own memory next
# to what else is there: 32 images of DeiT-B at 224 px (v5e, by XLA's estimate).
FAST_BYTES = 40e6
# What the teacher takes at a time: convolutions gain from more images. RegNetY-16GF, 128 images of
# 224 px on a v5e: 78 M cycles and 1.0 GB at once, 92 M and 0.6 GB in parts of 32.
TEACHER_PIXELS = 128 * 224**2


def micro_batches(config, mesh, num_classes: int = 1000) -> int:
    """Return in how many parts a device takes its share of the batch.

    `optim.accum_steps` and `train.micro_batch` say so. Without either a transformer has, on TPUs,
    the fewest parts of which one layer's attention weights fit into FAST_BYTES, on GPUs the fewest
    that fit into the memory, if the device tells how much it has. With batch norm and with dropout,
    which draws a number per activation, parts would be another computation: only accum_steps asks
    for that. Raise UserError if not even one image fits, or if equal parts of about
    `train.micro_batch` images cannot be had.
    """
    most, steps = config.train.micro_batch, config.optim.accum_steps
    if mesh is None or steps > 1:
        return steps
    model, share = config_lib.build_model(config.model, num_classes=2), share_of(config, mesh)
    if most == 0 or not hasattr(model, "draw_scales") or model.dropout:
        return 1
    if most is not None:
        return _asked_for(share, most)
    platform = sharding.platform(mesh)
    if platform == "gpu":
        return _fitting(_text(config), mesh, num_classes)[0]
    if platform != "tpu":
        return 1
    most = fast_images(model, mesh.shape["tensor"])
    parts = _fewest(share, lambda images: images <= most)
    # A share with no fitting divisor (74 = 2 x 37) is faster whole than in crumbs.
    return parts if 2 * (share // parts) >= most else 1


def teacher_parts(config, mesh, num_classes: int = 1000) -> int:
    """Return in how many parts a device's share of the batch goes through the teacher.

    In as few as TEACHER_PIXELS allows, or a GPU's memory, where the student's parts were chosen
    here; in the student's own where they were asked for, which saves memory.
    """
    parts = micro_batches(config, mesh, num_classes)
    if mesh is None or config.optim.accum_steps > 1 or config.train.micro_batch is not None:
        return parts
    if sharding.platform(mesh) == "gpu":
        return _fitting(_text(config), mesh, num_classes)[1]
    if parts == 1:
        return parts
    size = config.teacher.image_size or config_lib.image_size(config.model)
    most = max(1, TEACHER_PIXELS // size**2)
    return min(parts, _fewest(share_of(config, mesh), lambda images: images <= most))


def forward_parts(model, size: int, share: int, mesh, held: int) -> int:
    """Return in how many parts a device predicts for its share, beside the bytes that it holds."""
    if (limit := memory.limit(mesh)) is None:
        return 1
    takes = memory.of_forward(model, size)
    free = memory.USABLE * limit - held - share * 3 * size**2  # as loaded
    return _fewest(share, lambda images: takes.bytes(images) <= free) or share


def share_of(config, mesh) -> int:
    """Return how many examples of a batch a device has."""
    return config.batch_size // (mesh.size // mesh.shape["tensor"])


def expected_bytes(config, mesh, num_classes: int) -> int:
    """Return about how much of a device's memory a step takes."""
    parts = micro_batches(config, mesh, num_classes)
    images = share_of(config, mesh) // parts
    student = _gradient(_text(config), num_classes).bytes(images)
    sums = memory.gradient_bytes(config, num_classes) if parts > 1 else 0
    return _held(config, mesh, num_classes) + sums + student


def explained(config, mesh, num_classes: int):
    """Turn a training's "out of memory" into one line with the fields to change, in a context."""
    images = share_of(config, mesh) // micro_batches(config, mesh, num_classes)
    return memory.explained("training", memory.advice(config, images))


def fast_images(model, tensor: int) -> int:
    """Return of how many images a layer's attention weights fit into FAST_BYTES."""
    tokens = model.grid_size**2 + model.num_prefix_tokens
    padded = -(-tokens // 128) * 128  # a row of a TPU's registers
    return max(1, int(FAST_BYTES / (2 * model.num_heads / tensor * tokens * padded)))


def _asked_for(share: int, most: int) -> int:
    """Return the parts that `train.micro_batch` means."""
    parts = _fewest(share, lambda images: images <= most)
    if 2 * (share // parts) < min(most, share):
        larger = min(n for n in range(most, share + 1) if share % n == 0)
        raise UserError(
            f"config.train.micro_batch={most}: a device's share, {share} images, has no equal "
            f"parts of {(most + 1) // 2} to {most}; take {larger}, or another batch_size"
        )
    return parts


def _text(config) -> str:
    return json.dumps(config_lib.to_json(config))


@functools.lru_cache(maxsize=16)  # tracing takes a second, and several ask
def _gradient(config_text: str, num_classes: int) -> memory.Takes:
    return memory.of_gradient(config_lib.from_json(json.loads(config_text)), num_classes)


@functools.lru_cache(maxsize=16)
def _fitting(config_text: str, mesh, num_classes: int) -> tuple[int, int]:
    """Return the fewest parts, of student and teacher, that fit into the memory of GPUs."""
    if (limit := memory.limit(mesh)) is None:
        return 1, 1
    config = config_lib.from_json(json.loads(config_text))
    share, held = share_of(config, mesh), _held(config, mesh, num_classes)
    student, free = _gradient(config_text, num_classes), memory.USABLE * limit - held
    sums = memory.gradient_bytes(config, num_classes)

    def fits(images: int) -> bool:
        return student.bytes(images) + (sums if images < share else 0) <= free

    parts, teacher_parts = _fewest(share, fits), 1
    # The estimate is on the safe side: what is refused is far from fitting.
    if parts is None and (needed := held + sums + student.bytes(1)) > limit:
        raise UserError(
            f"config.model.name={config.model.name}: a step takes about {needed / 1e9:.1f} GB of a "
            f"device with one image at a time, and it has {limit / 1e9:.1f} GB for it; try "
            "--config.model.remat=True, --config.mesh.fsdp=N over several devices, or a smaller "
            "--config.batch_size"
        )
    if memory.has_teacher(config):
        teacher = memory.of_forward(*memory.teacher_of(config, num_classes))
        teacher_parts = _fewest(share, lambda images: teacher.bytes(images) <= free) or share
    return parts or share, teacher_parts


def _held(config, mesh, num_classes: int) -> int:
    """Return the bytes of the state and of the batch, which lie there throughout a step."""
    pixels = share_of(config, mesh) * 3 * config_lib.image_size(config.model) ** 2
    return memory.state_bytes(config, mesh, num_classes) + memory.PIXEL_BYTES * pixels


def _fewest(share: int, fits: Callable[[int], bool]) -> int | None:
    """Return the fewest equal parts whose images fit, None if none does."""
    divisors = (n for n in range(1, share + 1) if share % n == 0)
    return next((n for n in divisors if fits(share // n)), None)
