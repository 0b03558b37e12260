"""Find the weights of a model in a checkpoint, whatever they are wrapped in and called before.

A place is a dict in the tree of a file and a prefix of the names in it: `teacher` and `backbone.`
for DINO. It is recognised by a model's own names, in all dialects that torch_names.py knows. Where
several fit, the rules of `choose` decide, or the caller names one.
"""

import bisect
import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from deit_jax.models import registry
from deit_jax.models.family import Family

_DEPTH = 20  # dicts in dicts that are looked into
_FEWEST = 4  # names that make a model
_SHOWN = 6  # names listed in a line
_WRAPPERS = ("model", "state_dict")  # looked into where no model is recognised
_AVERAGE = re.compile(r"(^|_)(ema|EMA)(_|$)")
# Where optimizers keep numbers of the same names.
OPTIMIZER = re.compile(r"(opt|optim|optimizers?|lr_scheduler|scaler)(_\w+)?")
# What is trained beside a backbone and no part of it: heads that project, decoders, losses.
_BESIDE = re.compile(
    r"((deit|vit)\.)?(head\.(mlp|layers?|last_layer|projection)|(\w+_)?decoder\w*|pooler|projector|"
    r"projection_head|proj_head|predictor|prototypes|(dino|ibot|projection)_head\w*|queue\w*|"
    r"(\w+_)?(loss|criterion)(_\w+)?|n_averaged)(\.|$)|(.*\.)?mask_token$"
)


class Refused(Exception):
    """What a file asks for, or holds, that weights do not need."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which weights of a file: the moving average, or those of a place by its name (`key`)."""

    ema: bool = False
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The tensors of a model by their names without a prefix, and what people should know."""

    tensors: dict[str, Any]
    notes: tuple[str, ...] = ()
    recognised: bool = True


@dataclasses.dataclass(frozen=True)
class _Place:
    keys: tuple[str, ...]
    prefix: str
    family: Family
    tensors: Mapping[str, Any]  # of the whole dict

    @property
    def label(self) -> str:
        return ".".join([*self.keys, *filter(None, self.prefix.split("."))]) or "."

    @property
    def is_average(self) -> bool:
        return any(_AVERAGE.search(part) for part in self.label.split("."))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        names = [name for name in self.tensors if name.startswith(self.prefix)]
        return {name[len(self.prefix) :]: tuple(self.tensors[name].shape) for name in names}


def choose(tree: Any, wanted: Wanted) -> Chosen:
    """Return the weights of a tree of dicts whose leaves have shapes.

    Weights as trained are taken, not their moving average, unless it is wanted or there is nothing
    else. Of a `teacher` and a `student` of the same shapes, which is DINO's way, the teacher.
    Raise Refused with the names of the places where this leaves several, or nothing.
    """
    places = list(_places(tree))
    if not places:
        if wanted.key:
            raise Refused(f"no model's weights at {wanted.key!r:.60}; leave ::KEY out")
        if wanted.ema:
            raise Refused("has no moving average of its weights")
        return Chosen(_unwrapped(tree), recognised=False)
    notes, named = [], places
    if wanted.key:
        named = [place for place in places if _is_named(place, wanted.key)]
        if not named:
            there = [place for place in places if place.label != "."]
            others = (
                f"there are {_labels(there)}" if there else "there is one model; leave ::KEY out"
            )
            raise Refused(f"no weights at {wanted.key!r:.60}; {others}")
    plain = [place for place in named if not place.is_average]
    averages = [place for place in named if place.is_average]
    if wanted.ema and not averages:
        raise Refused("has no moving average of its weights")
    left = averages if wanted.ema else plain or averages
    if not wanted.ema and plain and averages and not wanted.key:
        notes.append(
            f"a moving average of the weights is there too ({_labels(averages)}); deit convert "
            "--ema, config.init.ema or deit_jax.load(…, ema=True) takes it"
        )
    if not plain and averages and not wanted.ema:
        notes.append(f"the weights are a moving average ({_labels(averages)})")
    place, note = _the_one(left)
    tensors, beside = _own_tensors(place, places)
    return Chosen(tensors, (*notes, *note, *_words_on(place, beside)))


def _the_one(places: list[_Place]) -> tuple[_Place, list[str]]:
    if len(places) == 1:
        return places[0], []
    of_teacher = [place for place in places if "teacher" in place.label.split(".")]
    of_student = [place for place in places if "student" in place.label.split(".")]
    if len(of_teacher) == len(of_student) == 1 and len(places) == 2:
        (teacher,), (student,) = of_teacher, of_student
        if teacher.family is student.family and _backbone(teacher) == _backbone(student):
            note = f"of {_labels(places)} the teacher, which DINO's authors evaluate"
            return teacher, [f"{note}; FILE::student takes the other"]
    raise Refused(
        f"several weights: {_labels(places)}; say which: FILE::KEY, as in "
        f"FILE::{places[0].label:.60}"
    )


def _backbone(place: _Place) -> dict[str, tuple[int, ...]]:
    return {k: v for k, v in place.shapes().items() if not _BESIDE.match(k)}


def _labels(places: list[_Place]) -> str:
    labels = sorted({place.label[:60] for place in places})
    more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return " and ".join(labels[:_SHOWN]) + more


def _is_named(place: _Place, key: str) -> bool:
    return key == place.label or place.label.startswith(f"{key}.") or key in place.label.split(".")


def _places(tree: Any) -> Iterator[_Place]:
    """Yield where in a tree a model's names are, nearest first; optimizers' states are none."""
    ahead: collections.deque[tuple[tuple[str, ...], Any]] = collections.deque([((), tree)])
    seen: set[int] = set()
    while ahead:
        keys, node = ahead.popleft()
        if not isinstance(node, Mapping) or id(node) in seen or len(keys) > _DEPTH:
            continue
        seen.add(id(node))
        tensors = {k: v for k, v in node.items() if isinstance(k, str) and hasattr(v, "shape")}
        for prefix, family in _prefixes(tensors):
            yield _Place(keys, prefix, family, tensors)
        for key, value in node.items():
            if isinstance(key, str) and not OPTIMIZER.fullmatch(key):
                ahead.append(((*keys, key), value))


def _prefixes(tensors: Mapping[str, Any]) -> list[tuple[str, Family]]:
    """Return the prefixes before the first layer of a model, and whose layer it is."""
    at: dict[str, Family] = {}
    for name in tensors:
        for pattern, family in _first_layers():
            if match := pattern.fullmatch(name):
                at.setdefault(match[1] or "", family)
    names = sorted(tensors)
    fine = []
    for prefix, family in at.items():
        last = bisect.bisect_left(names, prefix) + _FEWEST - 1
        several = last < len(names) and names[last].startswith(prefix)
        if several and not any(OPTIMIZER.fullmatch(part) for part in prefix.split(".")):
            fine.append((prefix, family))
    return fine


@functools.cache
def _first_layers() -> tuple[tuple[re.Pattern[str], Family], ...]:
    """Return what finds the prefix before the weights of each family's first layer, in all names.

    Hugging Face's own `deit.`, `vit.` and `beit.`, which the heads go without, are no prefix.
    """
    patterns = []
    for family in registry.FAMILIES.values():
        stem = family.stem.replace("/", ".")
        if not stem:
            continue
        patterns.append((rf"(.*\.)?{re.escape(stem)}\.weight", family))
        for row in family.aliases:
            own = r"(?:(?:deit|vit|beit)\.)?" if row[0] == stem else ""
            also = [rf"(.*?\.)??{own}{re.escape(a)}\.weight" for a in row[1:] if row[0] == stem]
            patterns += [(pattern, family) for pattern in also]
    return tuple((re.compile(pattern, re.DOTALL), family) for pattern, family in patterns)


def _own_tensors(place: _Place, places: list[_Place]) -> tuple[dict[str, Any], list[str]]:
    """Return a place's tensors, and the names of those that are beside its model."""
    others = {p.prefix for p in places if p.keys == place.keys} - {place.prefix}
    others = {prefix for prefix in others if not place.prefix.startswith(prefix)}
    tensors, beside = {}, []
    for name, value in place.tensors.items():
        if any(name.startswith(prefix) for prefix in others):
            continue
        inside = name.startswith(place.prefix)
        short = name[len(place.prefix) :] if inside else _outside(name, place.prefix)
        if _BESIDE.match(short):
            beside.append(name)
        elif inside or _is_head(short, place.family):
            tensors[short] = value
        else:
            tensors[name] = value  # which is refused by its name
    return tensors, beside


def _outside(name: str, prefix: str) -> str:
    """Return a name without what it has in common with a prefix, by whole words."""
    words, common = name.split("."), prefix.split(".")
    start = 0
    while start < len(words) - 1 and start < len(common) and words[start] == common[start]:
        start += 1
    return ".".join(words[start:])


def _is_head(name: str, family: Family) -> bool:
    heads = {head.replace("/", ".") for head in family.heads}
    heads |= {alias for row in family.aliases if row[0] in heads for alias in row[1:]}
    return name.rpartition(".")[0] in heads


def _words_on(place: _Place, beside: list[str]) -> list[str]:
    notes = [f"names begin with {place.prefix:.60}: taken off"] if place.prefix else []
    if beside:
        tops = sorted({".".join(name.split(".")[:-1]) or name for name in beside})
        more = f" and {len(tops) - _SHOWN} more" if len(tops) > _SHOWN else ""
        shown = ", ".join(f"{name:.60}" for name in tops[:_SHOWN])
        notes.append(f"left out, as no part of the model: {shown}{more}")
    return notes


def _unwrapped(tree: Any) -> dict[str, Any]:
    """Return the named tensors of a checkpoint in which no model is recognised."""
    for key in _WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    items = tree.items() if isinstance(tree, Mapping) else ()
    tensors = {n: v for n, v in items if isinstance(n, str) and hasattr(v, "shape")}
    if not tensors:
        raise Refused(f"no weights found{_contents(tree)}")
    return tensors


def _contents(tree: Any) -> str:
    if not isinstance(tree, Mapping):
        return ""
    words = ", ".join(_word(key, value) for key, value in list(tree.items())[:50])
    return f" among {words}"[:200]


def _word(key: Any, value: Any) -> str:
    kind = getattr(value, "kind", "")
    text = f"{key!s:.60} ({kind})" if kind else f"{key!s:.60}"
    return "".join(c if c.isprintable() else "?" for c in text)
