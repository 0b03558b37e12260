"""One model of the page: what it sees of an image, what it answers, and what its tokens read."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from deit_jax import analysis
from deit_jax.analysis.predictions import sigmoid, softmax
from deit_jax.data.channels import as_colours
from deit_jax.errors import UserError
from deit_jax.models.preprocess import normalise
from deit_jax.models.vit import VisionTransformer
from deit_jax.step.eval_step import all_logits
from deit_jax.train.load_teacher import Loaded
from deit_jax.weights.fit import LoadedWeights

TOKENS = ("cls", "dist")


@dataclasses.dataclass(frozen=True)
class Look:
    """What a model made of one image.

    `pixels` [H W 3] are what it was shown, as colours; `probabilities` [K] those of each of
    `cls`, `dist`, `fused` and `teacher` that there is. `heads` [depth heads T g h] is how much of
    each patch the T learned tokens read in every block, `rollout` [T g h] through all of them; None
    of a model without attention. `cosine` is that of the two tokens as they leave the last block.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    probabilities: dict[str, np.ndarray]
    heads: Float[np.ndarray, "depth heads T g h"] | None = None
    rollout: Float[np.ndarray, "T g h"] | None = None
    cosine: float | None = None


class Model:
    """Weights that are ready to look at images, with a teacher or without.

    `title` names them on the page, `note` says what is missing there. `several` says that each
    class has a probability of its own.
    """

    note = ""

    def __init__(
        self,
        opened: LoadedWeights,
        title: str,
        teacher: Loaded | None = None,
        teacher_name: str = "",
        several: bool = False,
    ):
        self.opened, self.title, self.teacher_name = opened, title, teacher_name
        self.several = bool(several or opened.multi_label)
        network, teacher_params = teacher or (None, None)
        mean, std = (tuple(map(float, numbers)) for numbers in (opened.mean, opened.std))
        known = {"model": opened.model, "teacher": network, "mean": mean, "std": std}
        self._look = jax.jit(functools.partial(_look, **known))
        self._variables, self._teacher_params = jax.device_put((opened.variables, teacher_params))

    @property
    def attends(self) -> bool:
        """Whether it has tokens whose attention can be shown."""
        return isinstance(self.opened.model, VisionTransformer)

    @property
    def distilled(self) -> bool:
        """Whether it has a distillation token."""
        return bool(getattr(self.opened.model, "distilled", False))

    @property
    def depth(self) -> int:
        """How many blocks there are to look into, 0 without attention."""
        return self.opened.model.depth if self.attends else 0

    def look(self, view: UInt8[np.ndarray, "H W C"], name: str) -> Look:
        """Return what is made of an image as `opened.view` shows it; `name` is for errors.

        Raise UserError for answers that are not finite.
        """
        said = jax.device_get(self._look(self._variables, self._teacher_params, view[None]))
        logits, seen = said
        for who, row in logits.items():
            if not np.isfinite(row).all():
                whose = "the teacher's" if who == "teacher" else f"{self.title}'s"
                raise UserError(f"{name}: {whose} answer is not finite; the weights are damaged")
        probabilities = sigmoid if self.several else softmax
        answers = {who: probabilities(row)[0] for who, row in logits.items()}
        return Look(as_colours(view), answers, **_on_grid(self.opened.model, seen))


def _look(variables, teacher_params, images, *, model, teacher, mean, std):
    """Return the logits of all heads and, of a transformer, what its learned tokens read."""
    known = {"model": model, "teacher": teacher, "mean": mean, "std": std}
    logits = all_logits(variables, teacher_params, images, **known)
    if not isinstance(model, VisionTransformer):
        return logits, {}
    # XLA merges this pass with that of the logits: they have the same operations.
    params, shown = variables["params"], normalise(images, mean, std)
    maps, prefix = analysis.attention_maps(model, params, shown), model.num_prefix_tokens
    seen = {
        "heads": maps[0, :, :, :prefix, prefix:],
        "rollout": analysis.rollout(maps)[0, :prefix, prefix:],
    }
    if model.distilled:
        features = analysis.token_features(model, params, shown)
        seen["cosine"] = analysis.token_cosines(features)[-1]
    return logits, seen


def _on_grid(model, seen: dict[str, np.ndarray]) -> dict[str, Any]:
    if not seen:
        return {}
    cosine = float(seen["cosine"]) if "cosine" in seen else None
    grids = {
        k: seen[k].reshape(*seen[k].shape[:-1], *model.grid_size) for k in ("heads", "rollout")
    }
    return {**grids, "cosine": cosine}
