"""Whether an exported program, run by its own runtime, answers as the model does here."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from deit_jax.errors import UserError
from deit_jax.export.choices import DTYPES
from deit_jax.export.pixels import viewed
from deit_jax.export.program import Program
from deit_jax.models.preprocess import normalise
from deit_jax.shapes import sides

Run = Callable[[Any], dict[str, np.ndarray]]
SIZES = ((260, 200), (97, 150))  # of whole images
PIXELS = 0.5  # of 255: what a view may differ by from Pillow's on average, which rounds to bytes


@dataclasses.dataclass(frozen=True)
class Verified:
    """How far answers were apart, by the largest; of whole images also from `deit predict`'s."""

    images: int
    difference: float
    allowed: float
    of_predict: float | None = None


def verify(program: Program, run: Run) -> Verified:
    """Compare a program's answers with the model's; raise UserError where they are too far apart.

    The model's are those of float32 on this machine, to noise and smooth images, in batches of one
    and of more where any number is allowed; of whole images it is shown what `viewed` makes of
    them, and `of_predict` is how far answers are from those to Pillow's views.
    """
    with on_cpu(), jax.default_matmul_precision("highest"):
        return _compared(program, run)


def on_cpu():
    """Return a context in which JAX computes on the CPU, where there is one.

    GPUs and TPUs multiply float32 in fewer bits unless told otherwise.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return contextlib.nullcontext()


def _compared(program: Program, run: Run) -> Verified:
    allowed, answers = DTYPES[program.options.dtype], _model(program)
    see = jax.jit(functools.partial(viewed, view=program.opened.view))
    worst, count, of_predict = 0.0, 0, None
    for pixels in _images(program):
        whole = program.options.preprocess
        said = run(_given(program, pixels))
        seen = see(pixels) if whole else pixels
        expected = answers(seen)
        if said.keys() != expected.keys():
            raise UserError(f"the exported program's outputs are {', '.join(said)}; not written")
        difference = max(_apart(said[k], expected[k]) for k in said)
        if not difference <= allowed:  # NaN neither
            raise UserError(_refusal(program, difference, allowed))
        worst, count = max(worst, difference), count + len(pixels)
        if whole:
            predicted = answers(_seen_by_predict(program, pixels, np.asarray(seen)))
            apart = max(_apart(said[k], predicted[k]) for k in said)
            of_predict = max(of_predict or 0.0, apart)
    return Verified(count, worst, allowed, of_predict)


def _refusal(program: Program, difference: float, allowed: float) -> str:
    dtype = program.options.dtype
    reason = f"the exported program's answers differ from the model's by {difference:.2g} of the "
    reason += f"largest, where {allowed:g} is allowed of {dtype}; nothing was written"
    return reason if dtype == "float32" else reason + "; --dtype=float32 keeps them"


def _apart(said: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of two answers, in shares of the largest."""
    apart = np.abs(np.asarray(said, np.float64) - np.asarray(expected, np.float64)).max()
    return float(apart / max(1e-6, np.abs(expected).max()))


def _images(program: Program) -> list[np.ndarray]:
    """Return batches of pixels [B h w C]: noise, and what changes slowly."""
    rng, batch = np.random.default_rng(0), program.options.batch
    size, channels = sides(program.opened.image_size), program.opened.reading.channels
    shapes = SIZES if program.options.preprocess else (size, size)
    batches = []
    for count, (height, width) in zip((batch or 1, batch or 3), shapes, strict=True):
        noise = rng.integers(0, 256, (count, height, width, channels))
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x / (7 + 3 * c) + y / (11 + c)) for c in range(channels)]
        smooth = 127 * (1 + np.stack(waves, axis=-1))
        noise[-1] = smooth
        batches.append(noise.astype(np.uint8))
    return batches


def _given(program: Program, pixels: np.ndarray) -> np.ndarray:
    """Return images as the program takes them."""
    opened = program.opened
    if program.options.input == "normalised":
        mean, std = (np.asarray(x, np.float32) for x in (opened.mean, opened.std))
        pixels = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(
        pixels.transpose(0, 3, 1, 2) if program.options.layout == "NCHW" else pixels
    )


def _model(program: Program) -> Run:
    """Return the model itself, of float32 and with its own weights, given pixels at its size."""
    opened = program.opened
    mean, std = (tuple(map(float, x)) for x in (opened.mean, opened.std))
    model = opened.model.clone(dtype=np.dtype(np.float32))

    @jax.jit
    def heads(variables, pixels):
        return model.apply(variables, normalise(pixels, mean, std), train=False)

    def answers(pixels):
        said = heads(opened.variables, pixels)
        named = {"logits": said.fused()}
        if program.options.heads == "apart":
            named = {k: x for k, x in said._asdict().items() if x is not None}
        return jax.device_get(named)

    return answers


def _seen_by_predict(program: Program, pixels: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return Pillow's view of whole images; raise UserError where the program sees another."""
    view = program.opened.view
    views = np.stack([view(image, "image") for image in pixels])
    apart = np.abs(seen - views).mean()
    if apart > PIXELS:
        raise UserError(
            f"the exported program sees images {apart:.2g} of 255 apart from Pillow on average; "
            "nothing was written; leave --preprocess out"
        )
    return views
