"""Top-1 and top-5 of every head over a data set; of images with several labels, mAP."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax.config.serialize import flatten
from deit_jax.data.batches import EvalBatches
from deit_jax.data.loader import load
from deit_jax.data.sources.splits import listed
from deit_jax.data.view import EvalView, reading_of
from deit_jax.errors import Interrupted, UserError
from deit_jax.models.attention_maps import attention_entropy
from deit_jax.models.preprocess import normalise
from deit_jax.models.vit import VisionTransformer
from deit_jax.parallel import sharding
from deit_jax.shapes import Size, sides
from deit_jax.step import eval_step, micro_batches
from deit_jax.step.compile import placing
from deit_jax.train import memory, parts
from deit_jax.train.average_precision import figures

ATTENTION_IMAGES = 32  # that the attention's entropy is measured on
NAMES = {"teacher": "teacher", "cls": "class head", "dist": "distillation head", "fused": "fused"}


class Evaluator:
    """Evaluate variables of one model, or a teacher, on a fixed set of examples.

    `held` is what a device of the mesh holds meanwhile, in bytes.
    """

    def __init__(
        self,
        source,
        data,
        batch_size: int,
        image_size: Size,
        mesh,
        stopping=lambda: False,
        classes: Sequence[str] = (),
    ):
        """Take examples of a source; `data` is config.data, for normalisation, crop and loading.

        `classes` are named where images have several labels.
        """
        rows = sharding.local_rows(mesh, batch_size)
        view = EvalView(image_size, data.eval_crop_ratio, reading_of(data))
        self._batches = EvalBatches(source, batch_size, view, rows, data.skip_unreadable)
        self.image_size, self._batch_size = image_size, batch_size
        self._data, self._mesh, self._examples = data, mesh, len(source)
        self._stopping, self.held = stopping, 0
        self._counted = self._examples  # of them, those that could be read
        self._classes, self._without = classes, list[str]()
        self._few: jax.Array | None = None  # the first images, once they were met
        self._share = batch_size // (mesh.size // mesh.shape["tensor"])

    @functools.cached_property
    def _count(self):
        count = functools.partial(eval_step.eval_step, mean=self._data.mean, std=self._data.std)
        return jax.jit(
            placing(count, self._mesh),
            static_argnames=("model", "parts"),
        )

    @functools.cached_property
    def _answer(self):
        answer = functools.partial(eval_step.eval_logits, mean=self._data.mean, std=self._data.std)
        return jax.jit(
            placing(answer, self._mesh),
            static_argnames=("model", "parts"),
            out_shardings=sharding.replicated(self._mesh),  # every process ranks all examples
        )

    def model(self, model, variables, watch: Callable | None = None) -> dict[str, Any]:
        """Return {"cls" | "dist" | "fused": {"top1", "top5"}} in percent of the examples.

        Of images with several labels {"mAP", "AP": {class: …}}. `watch(numbers, labels, logits)` is
        told what each head [n K] said of the examples of each batch that can be read.
        """
        takes = functools.partial(memory.of_forward, model, self.image_size)
        known = {"model": model, "parts": self._parts(takes)}
        answer = functools.partial(self._answer, variables, **known)
        if self._data.multi_label:
            return self._rank(answer)
        if watch is not None:
            return self._evaluate(self._watched(answer, watch))
        return self._evaluate(functools.partial(self._count, variables, **known))

    def _watched(self, answer: Callable, watch: Callable) -> Callable:
        """Return what counts the right answers to a batch after they were looked at."""
        firsts = itertools.count(step=self._batch_size)
        score = jax.jit(eval_step.count_answers)

        def count(batch):
            answers = answer(batch=batch)
            logits = jax.device_get(answers)
            valid, labels = logits.pop("valid"), logits.pop("label")
            numbers = next(firsts) + np.flatnonzero(valid)
            watch(numbers, labels[valid], {name: x[valid] for name, x in logits.items()})
            return score(answers)

        return count

    def examples(self) -> dict[str, Any]:
        """Return how many examples were counted last and, if any were not, how many were not.

        With several labels an image, also the names of "without_positives": classes without any.
        """
        left_out = self._examples - self._counted
        return {
            "examples": self._counted,
            **({"unreadable": left_out} if left_out else {}),
            **({"without_positives": self._without} if self._without else {}),
        }

    def read(self, index: int) -> tuple[np.ndarray, int | np.ndarray] | None:
        """Return an example as it is evaluated and its label, None where it is left out."""
        return self._batches.read(index)

    def _parts(self, takes: Callable[[], memory.Takes]) -> int:
        loaded = math.prod(sides(self.image_size)) * self._data.channels
        return parts.forward_parts(takes, loaded, self._share, self._mesh, self.held)

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

    def teacher(self, teacher, params) -> dict[str, Any]:
        """Return the teacher's {"top1", "top5"} on images as a student's step hands them over.

        Of images with several labels {"mAP", "AP"}.
        """
        takes = functools.partial(memory.of_teacher, teacher, params, self.image_size)
        count_of_parts = self._parts(takes)

        def predict(params, batch):
            def predict_part(images):
                return teacher.logits(params, self._normalise(images))

            return micro_batches.in_parts(predict_part, batch["image"], count_of_parts)

        predict = placing(predict, self._mesh)
        if self._data.multi_label:

            @functools.partial(jax.jit, out_shardings=sharding.replicated(self._mesh))
            def answer(params, batch):
                known = {"label": batch["label"], "valid": batch["valid"]}
                return {"teacher": predict(params, batch), **known}

            return self._rank(functools.partial(answer, params))["teacher"]

        @jax.jit
        def count(params, batch):
            logits = predict(params, batch)
            right = eval_step.count_correct(logits, batch["label"], batch["valid"])
            return {"teacher": right, "examples": jnp.sum(batch["valid"])}

        return self._evaluate(functools.partial(count, params))["teacher"]

    def _evaluate(self, count) -> dict[str, Any]:
        """Return the sums of what is counted in each batch, in percent of the examples."""
        totals: Any = None

        def add(counts) -> None:
            nonlocal totals
            totals = counts if totals is None else jax.tree.map(jnp.add, totals, counts)

        with self._explained():
            self._each(count, add)
            totals = jax.device_get(totals)
        self._tell_count(int(totals.pop("examples")))  # those of every process
        return jax.tree.map(lambda n: 100.0 * int(n) / self._counted, totals)

    def _rank(self, answer) -> dict[str, Any]:
        """Return the average precisions of every head's logits of all examples."""
        parts: list[dict[str, np.ndarray]] = []

        def keep(answers) -> None:
            answers = jax.device_get(answers)
            valid = answers.pop("valid")
            parts.append({name: x[valid] for name, x in answers.items()})

        with self._explained():
            self._each(answer, keep)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        labels = whole.pop("label")
        self._tell_count(len(labels))
        there = np.asarray(labels.any(axis=0))
        self._without = [self._classes[i] for i in np.flatnonzero(~there).tolist()]
        if not there.any():
            raise UserError(
                f"config.data.source={self._data.source}: none of its {len(labels)} images for "
                "evaluation has a label; take others, or a larger config.data.eval_fraction"
            )
        return {name: figures(x, labels, self._classes) for name, x in whole.items()}

    def _tell_count(self, counted: int) -> None:
        self._counted = counted
        if not counted:
            raise UserError(
                f"config.data.source={self._data.source}: none of its {self._examples} images for "
                "evaluation can be read; repair them"
            )

    def _explained(self) -> contextlib.AbstractContextManager:
        smaller = max(1, self._batch_size // 2)
        return memory.explained("evaluation", f"try --config.train.eval_batch_size={smaller}")

    def _each(self, function, take: Callable[[Any], None]) -> None:
        """Take what a function makes of each batch on the devices."""
        loader = load(
            self._batches, 0, len(self._batches), self._data.threads, self._data.prefetch_batches
        )
        with contextlib.closing(loader):
            for read in loader:
                batch = sharding.to_devices(read, self._mesh, self._batch_size)
                del read  # or its memory would not be free while the next is loaded
                if self._few is None:
                    self._few = self._first_images(batch["image"], batch["valid"])
                take(function(batch=batch))
                if self._stopping():
                    raise Interrupted("stopped while evaluating")

    def _first_images(self, images: jax.Array, valid: jax.Array) -> jax.Array:
        count = min(ATTENTION_IMAGES, self._examples, len(images))
        everywhere = sharding.replicated(self._mesh)
        if self._data.skip_unreadable:  # those that are not black come first
            valid_first = jax.jit(
                lambda x, v: x[jnp.argsort(~v, stable=True)[:count]], out_shardings=everywhere
            )
            return valid_first(images, valid)
        return jax.jit(lambda x: x[:count], out_shardings=everywhere)(images)


def told(results: dict[str, Any]) -> dict[str, float]:
    """Return what of an evaluation is followed as a run goes on: {"fused.top1": …}.

    The average precision of single classes is that of the fused prediction.
    """
    heads = {
        key: value
        for key, value in flatten(results).items()
        if "." in key and ".AP." not in key  # of a head, not counts
    }
    each = results["fused"].get("AP", {})
    return heads | {f"fused.AP.{name}": v for name, v in each.items() if v is not None}


def table(results: dict[str, Any]) -> str:
    """Return the results as lines for people; "" where there were no labels to evaluate on."""
    if "examples" not in results:
        return ""
    left_out = results.get("unreadable", 0)
    beside = f", besides {left_out} that cannot be read" if left_out else ""
    lines = [f"{results['examples']} examples{beside}"]
    if "mAP" in results["fused"]:
        return "\n".join([*lines, *_precisions(results)])
    lines.append(f"{'':24}{'top-1 %':>9}{'top-5 %':>9}")
    for label, group in (("", results), (" (EMA)", results.get("ema", {}))):
        for key, name in NAMES.items():
            if key in group:
                top1, top5 = group[key]["top1"], group[key]["top5"]
                lines.append(f"{name + label:24}{top1:9.2f}{top5:9.2f}")
    return "\n".join(lines)


def _precisions(results: dict[str, Any]) -> list[str]:
    """Return lines of the mean average precision of every head, and of each class in the best."""
    named = {
        name + label: group[key]
        for label, group in (("", results), (" (EMA)", results.get("ema", {})))
        for key, name in NAMES.items()
        if key in group
    }
    lines = [f"{'':24}{'mAP %':>9}", *(f"{k:24}{v['mAP']:9.2f}" for k, v in named.items())]
    if without := results.get("without_positives"):
        lines.append(f"mean without {len(without)} classes of no positives: {listed(without)}")
    lines += ["", f"{'fused, by class':24}{'AP %':>9}"]
    known = [(k, v) for k, v in results["fused"]["AP"].items() if v is not None]
    return lines + [f"{name:24}{value:9.2f}" for name, value in known]
