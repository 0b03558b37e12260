"""What is known of a model that is given away: accuracies, recipe, data, teacher."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import numpy as np

from deit_jax.config.serialize import flatten, to_json
from deit_jax.storage import exists, read_json, to_path
from deit_jax.weights.fit import LoadedWeights
from deit_jax.workdir import records

HEADS = {"fused": "both heads", "cls": "class head", "dist": "distillation head"}
TEACHER = "teacher"
# An absolute path in a config's value, also behind `folder:`; no address such as gs://…
PLACE = re.compile(r"(?<![\w/~])/[^/\s,:][^\s,:]*|(?<!\w)[A-Za-z]:\\[^\s,]+|~/[^\s,:]+")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Accuracies of these very weights: {head: {"top1", …}} in percent, of `images` of `split`.

    `of` is how many the split has, None where that is not known.
    """

    heads: dict[str, dict[str, float]]
    images: int | None
    of: int | None
    split: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a model card is made of; `config` and what follows are None without a run."""

    opened: LoadedWeights
    ema: bool
    measured: Measured | None = None
    config: dict[str, Any] | None = None
    data_card: dict[str, Any] | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        leaves = _leaves(self.opened.variables["params"])
        return sum(int(np.size(leaf)) for leaf in leaves)

    @property
    def single(self) -> bool:
        """Whether the model has one head."""
        return not getattr(self.opened.model, "distilled", False) or not self.opened.model.dist_head


def _leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    else:
        yield tree


def facts_of(opened: LoadedWeights, source: str, ema: bool, figures: dict | None = None) -> Facts:
    """Return what is known of weights; `figures` are those of a run's report."""
    if opened.run is None:
        return Facts(opened, ema)
    workdir = to_path(source)
    config = to_json(opened.run.config)
    measured = _of_results(opened, workdir, ema, config) or _of_report(figures, config)
    return Facts(opened, ema, measured, config, records.data_card(workdir))


def _of_results(
    opened: LoadedWeights, workdir: PurePath, ema: bool, recorded: dict[str, Any]
) -> Measured | None:
    """Return what results.json says, if it is of this checkpoint and of this kind of weights."""
    assert opened.run is not None
    if not exists(workdir / "results.json"):
        return None
    results = read_json(workdir / "results.json")
    if results.get("step") != opened.run.step:
        return None
    of = results.get("ema", {}) if ema else results
    heads = {k: of[k] for k in HEADS if isinstance(of.get(k), dict)}
    if not heads:
        return None
    if isinstance(results.get(TEACHER), dict):
        heads[TEACHER] = results[TEACHER]
    examples = results.get("examples")
    return Measured(heads, examples, examples, _split(recorded))


def _of_report(figures: dict[str, Any] | None, recorded: dict[str, Any]) -> Measured | None:
    """Return what the report evaluated of these weights, on some or all images of the split."""
    found = (figures or {}).get("evaluation")
    if not found:
        return None
    key = "mAP" if "mAP" in found else "top1"
    heads = {head: {key: value} for head, value in found[key].items() if value is not None}
    return Measured(heads, found["images"], found["of"], _split(recorded))


def _split(recorded: dict[str, Any]) -> str:
    return str(recorded["data"]["eval_split"])


def without_places(text: str, recorded: dict[str, Any] | None, others: Iterable[str]) -> str:
    """Return a text without the folders of this machine: a path's last part is left of it.

    Those that a recorded config names, wherever in its values, and `others`.
    """
    values = [v for v in flatten(recorded or {}).values() if isinstance(v, str)]
    places = {found for value in values for found in PLACE.findall(value)}
    places |= {place for place in others if place}
    for place in sorted(places, key=len, reverse=True):
        name = re.split(r"[\\/]", place.rstrip("\\/"))[-1]
        if len(place) > 1 and name:
            text = text.replace(place, f"…/{name}")
    return text
