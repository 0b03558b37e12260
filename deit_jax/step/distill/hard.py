"""Hard distillation: the teacher's decision is a second label (DeiT eq. 3)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from deit_jax.step.distill.base import Distillation, Layout, Outputs, TapeForm
from deit_jax.step.losses import binary_cross_entropy, cross_entropy


def hard_distillation(
    logits: Float[Array, "B K"], teacher_labels: Int[Array, "B"]
) -> Float[Array, ""]:
    """Return the cross-entropy with the teacher's argmax, not smoothed (DeiT eq. 3)."""
    return cross_entropy(logits, jax.nn.one_hot(teacher_labels, logits.shape[-1]))


def _target(outputs: Outputs) -> Int[Array, "B"]:
    return jnp.argmax(outputs.heads.fused(), axis=-1)


def _loss(outputs: Outputs, target, settings, extras) -> Float[Array, ""]:
    return hard_distillation(outputs.heads.taught, target)


def _arrays(layout: Layout) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    label = np.dtype(np.int16 if layout.num_classes <= 2**15 else np.int32)
    return {"labels": (label, (layout.batch_size,))}


def _pack(target: Int[Array, "B"], layout: Layout) -> dict[str, Array]:
    return {"labels": target.astype(_arrays(layout)["labels"][0])}


def _unpack(parts, layout: Layout) -> Int[np.ndarray, "b"]:
    return parts["labels"].astype(np.int32)


def _keeps(top_k: int, num_classes: int) -> int:
    return 1


def _target_of_each(outputs: Outputs) -> Bool[Array, "B K"]:
    """Return which classes the teacher sees: those whose sigmoid is above a half."""
    return outputs.heads.fused() > 0.0


def _loss_of_each(outputs: Outputs, target, settings, extras) -> Float[Array, ""]:
    return binary_cross_entropy(outputs.heads.taught, target.astype(jnp.float32))


def _bits(layout: Layout) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    width = -(-layout.num_classes // 8)
    return {"labels": (np.dtype(np.uint8), (layout.batch_size, width))}


def _pack_bits(target: Bool[Array, "B K"], layout: Layout) -> dict[str, UInt8[Array, "B k"]]:
    return {"labels": jnp.packbits(target, axis=-1)}


def _unpack_bits(parts, layout: Layout) -> Bool[np.ndarray, "b K"]:
    return np.unpackbits(parts["labels"], axis=-1, count=layout.num_classes).astype(bool)


SEVERAL = Distillation(
    target=_target_of_each,
    loss=_loss_of_each,
    tape=TapeForm(True, arrays=_bits, pack=_pack_bits, unpack=_unpack_bits, keeps=_keeps),
)
HARD = Distillation(
    target=_target,
    loss=_loss,
    tape=TapeForm(exact=True, arrays=_arrays, pack=_pack, unpack=_unpack, keeps=_keeps),
    several=SEVERAL,
)
