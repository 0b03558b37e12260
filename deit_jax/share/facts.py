"""What is known of a model that is given away: accuracies, recipe, data, teacher."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from deit_jax.config.serialize import flatten, to_json
from deit_jax.storage import exists, read_json, to_path
from deit_jax.weights.fit import LoadedWeights
from deit_jax.workdir import records

HEADS = {"fused": "both heads", "cls": "class head", "dist": "distillation head"}
TEACHER = "teacher"
# An absolute path, behind nothing or `folder:` and the like; no address such as gs://…
_PLACE = re.compile(
    r"((?:[A-Za-z_]{2,}:)*)((?:[A-Za-z]:)?[\\/](?![\\/])|\\\\|~[\\/])(.*)", re.DOTALL
)


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
    """What a card is made of; `config`, its paths cut, and what follows are None of no run."""

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
    shown = without_places(config, places_of(workdir, config))
    measured = _of_results(opened, workdir, ema, config) or _of_report(figures, config)
    return Facts(opened, ema, measured, shown, records.data_card(workdir))


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


def without_places(value: Any, known: Iterable[str] = ()) -> Any:
    """Return JSON without the folders of this machine: of a path its last part is left.

    A text that is a path, or several with commas between, also behind `folder:` and the like, is
    cut by itself; in other texts the `known` places are. Addresses, as gs://…, stay.
    """
    if isinstance(value, dict):
        return {key: without_places(x, known) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(x, known) for x in value]
    if not isinstance(value, str):
        return value
    cut = ",".join(map(_cut, value.split(",")))
    if cut == value:
        for place in sorted(known, key=len, reverse=True):
            cut = cut.replace(place, _cut(place))
    return cut


def _cut(text: str) -> str:
    found = _PLACE.fullmatch(text)
    return f"{found[1]}…/{_last(text)}" if found else text


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def places_of(workdir: PurePath, recorded: dict[str, Any]) -> list[str]:
    """Return the places of this machine that a run's records may name."""
    texts = [v for v in flatten(recorded).values() if isinstance(v, str)]
    parts = (_PLACE.fullmatch(part) for text in texts for part in text.split(","))
    places = {match[2] + match[3] for match in parts if match}
    if isinstance(workdir, Path):
        places |= {str(workdir.absolute()), str(workdir.resolve()), str(Path.home())}
    return [place for place in places if len(place) > 1]
