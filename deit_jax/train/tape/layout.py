"""The arrays of a label tape: which there are for a kind of distillation, made and read."""

import zlib
from typing import Any

import numpy as np
from jaxtyping import Array, Shaped

from deit_jax.step.distill.base import Layout, TapeForm
from deit_jax.step.objective import chosen


def form_of(layout: Layout) -> TapeForm:
    """Return how the targets of a layout's kind lie on a tape."""
    form = chosen(layout.kind, layout.several).tape
    assert form is not None  # validate has refused the others
    return form


def arrays_of(layout: Layout) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Return for each array its dtype and the shape of one step in it."""
    return form_of(layout).arrays(layout)


def pack(target, layout: Layout) -> dict[str, Array]:
    """Return what is learned of a teacher in the form of the tape's arrays, on the device."""
    return form_of(layout).pack(target, layout)


def unpack(parts: dict[str, Shaped[np.ndarray, "b ..."]], layout: Layout) -> Any:
    """Return what was packed, or for a tape that is not exact, what it knows of it."""
    return form_of(layout).unpack(parts, layout)


def packing(step, layout: Layout):
    """Return a train step whose metrics hold the teacher's target as the tape's arrays."""

    def packed(*args):
        state, metrics = step(*args)
        return state, {**metrics, "teacher_target": pack(metrics["teacher_target"], layout)}

    return packed


def checksum(parts: dict[str, np.ndarray]) -> int:
    """Return the CRC-32 of one step's arrays, in the order of their names."""
    crc = 0
    for name in sorted(parts):
        crc = zlib.crc32(parts[name].tobytes(), crc)
    return crc
