"""Top-1 and top-5 of every head over a data set."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax.data.batches import EvalBatches
from deit_jax.data.loader import load
from deit_jax.data.view import EvalView, reading_of
from deit_jax.errors import Interrupted, UserError
from deit_jax.models.attention_maps import attention_entropy
from deit_jax.models.preprocess import normalise
from deit_jax.models.vit import VisionTransformer
from deit_jax.parallel import sharding
from deit_jax.shapes import Size
from deit_jax.step import eval_step, micro_batches
from deit_jax.train import memory, parts

ATTENTION_IMAGES = 32  # that the attention's entropy is measured on
NAMES = {"teacher": "teacher", "cls": "class head", "dist": "distillation head", "fused": "fused"}


class Evaluator:
    """Evaluate variables of one model, or a teacher, on a fixed set of examples.

    `held` is what a device of the mesh holds meanwhile, in bytes.
    """

    def __init__(
        self, source, data, batch_size: int, image_size: Size, mesh, stopping=lambda: False
    ):
        """Take examples of a source; `data` is config.data, for normalisation, crop and loading."""
        rows = sharding.local_rows(mesh, batch_size)
        view = EvalView(image_size, data.eval_crop_ratio, reading_of(data))
        self._batches = EvalBatches(source, batch_size, view, rows, data.skip_unreadable)
        self.image_size, self._batch_size = image_size, batch_size
        self._data, self._mesh, self._examples = data, mesh, len(source)
        self._stopping, self.held = stopping, 0
        self._counted = self._examples  # of them, those that could be read
        self._few: jax.Array | None = None  # the first images, once they were met
        self._share = batch_size // (mesh.size // mesh.shape["tensor"])

    @functools.cached_property
    def _count(self):
        return jax.jit(
            functools.partial(eval_step.eval_step, mean=self._data.mean, std=self._data.std),
            static_argnames=("model", "parts"),
        )

    def model(self, model, variables) -> dict[str, Any]:
        """Return {"cls" | "dist" | "fused": {"top1", "top5"}} in percent of the examples."""
        count = self._parts(model, self.image_size)
        return self._evaluate(functools.partial(self._count, variables, model=model, parts=count))

    def examples(self) -> dict[str, int]:
        """Return how many examples were counted last and, if any were not, how many were not."""
        left_out = self._examples - self._counted
        return {"examples": self._counted, **({"unreadable": left_out} if left_out else {})}

    def read(self, index: int) -> tuple[np.ndarray, int] | None:
        """Return an example as it is evaluated and its label, None where it is left out."""
        return self._batches.read(index)

    def _parts(self, model, size: Size) -> int:
        return parts.forward_parts(model, size, self._share, self._mesh, self.held)

    @functools.cached_property
    def _entropy(self):
        def entropy(variables, images, model):
            return attention_entropy(model, variables, self._normalise(images))

        return jax.jit(entropy, static_argnames="model")

    def _normalise(self, images):
        return normalise(images, self._data.mean, self._data.std)

    def attention(self, model, variables) -> dict[str, float]:
        """Return the attention's entropy in nats on the first images: mean, and the lowest head's.

        {} for a model without attention. `model` must have been called before.
        """
        if not isinstance(model, VisionTransformer):
            return {}
        entropy = jax.device_get(self._entropy(variables, self._few, model=model))
        return {"mean": entropy.mean().item(), "lowest_head": entropy.min().item()}

    def teacher(self, teacher, params) -> dict[str, float]:
        """Return the teacher's {"top1", "top5"} on images as a student's step hands them over."""

        count_of_parts = self._parts(teacher.model, teacher.image_size or self.image_size)

        @jax.jit
        def count(params, batch):
            def predict(images):
                return teacher.logits(params, self._normalise(images))

            logits = micro_batches.in_parts(predict, batch["image"], count_of_parts)
            right = eval_step.count_correct(logits, batch["label"], batch["valid"])
            return {"teacher": right, "examples": jnp.sum(batch["valid"])}

        return self._evaluate(functools.partial(count, params))["teacher"]

    def _evaluate(self, count) -> dict[str, Any]:
        smaller = max(1, self._batch_size // 2)
        remedy = f"try --config.train.eval_batch_size={smaller}"
        with memory.explained("evaluation", remedy):
            return self._count_all(count)

    def _count_all(self, count) -> dict[str, Any]:
        totals = None
        loader = load(
            self._batches, 0, len(self._batches), self._data.threads, self._data.prefetch_batches
        )
        with contextlib.closing(loader):
            for read in loader:
                batch = sharding.to_devices(read, self._mesh, self._batch_size)
                del read  # or its memory would not be free while the next is loaded
                if self._few is None:
                    self._few = self._first_images(batch["image"], batch["valid"])
                counts = count(batch=batch)
                totals = counts if totals is None else jax.tree.map(jax.numpy.add, totals, counts)
                if self._stopping():
                    raise Interrupted("stopped while evaluating")
        totals = jax.device_get(totals)
        self._counted = counted = int(totals.pop("examples"))  # those of every process
        if not counted:
            raise UserError(
                f"config.data.source={self._data.source}: none of its {self._examples} images for "
                "evaluation can be read; repair them"
            )
        return jax.tree.map(lambda n: 100.0 * int(n) / counted, totals)

    def _first_images(self, images: jax.Array, valid: jax.Array) -> jax.Array:
        count = min(ATTENTION_IMAGES, self._examples, len(images))
        everywhere = sharding.replicated(self._mesh)
        if self._data.skip_unreadable:  # those that are not black come first
            valid_first = jax.jit(
                lambda x, v: x[jnp.argsort(~v, stable=True)[:count]], out_shardings=everywhere
            )
            return valid_first(images, valid)
        return jax.jit(lambda x: x[:count], out_shardings=everywhere)(images)


def table(results: dict[str, Any]) -> str:
    """Return the results as lines for people."""
    left_out = results.get("unreadable", 0)
    beside = f", besides {left_out} that cannot be read" if left_out else ""
    lines = [f"{results['examples']} examples{beside}", f"{'':24}{'top-1 %':>9}{'top-5 %':>9}"]
    for label, group in (("", results), (" (EMA)", results.get("ema", {}))):
        for key, name in NAMES.items():
            if key in group:
                top1, top5 = group[key]["top1"], group[key]["top5"]
                lines.append(f"{name + label:24}{top1:9.2f}{top5:9.2f}")
    return "\n".join(lines)
