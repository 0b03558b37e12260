"""What people call the parts of a data set: train, training_set, valid, dev, Test, val2017, …"""

import re
from collections.abc import Iterable, Sequence

from deit_jax.errors import UserError

KINDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
FILLERS = ("set", "data", "images", "imgs", "split")  # val_images, training-set


def kind_of(name: str) -> str | None:
    """Return train, validation or test for the usual names of such a part, None for others."""
    words = _words(name)
    return _kind(words[0]) if len(words) == 1 else None


def kinds_in(name: str) -> set[str]:
    """Return the kinds that are named anywhere in a name, as in `imagenet1k-train-0000.tar`."""
    return {kind for word in _words(name) if (kind := _kind(word))}


def _words(name: str) -> list[str]:
    if "[" in name or "+" in name:  # train[:80%], which is no name but a part of a split
        return []
    return [w for w in re.findall(r"[^\W\d_]+", name.lower()) if w not in FILLERS]


def _kind(word: str) -> str | None:
    word = word.removesuffix("set")  # trainset
    return next((kind for kind, words in KINDS.items() if word in words), None)


def choose_split(wanted: str, there: Sequence[str]) -> str | None:
    """Return the split that is meant: of this very name, else the one of the same kind.

    What is asked for as `validation`, the default, may be a test split where nothing else is there
    to evaluate on. None where there is none; raise UserError where several could be meant.
    """
    if wanted in there:
        return wanted
    kind = kind_of(wanted)
    kinds = [kind, "test"] if kind == "validation" else [kind]
    same = [name for name in there if name.lower() == wanted.lower()]
    for names in (same, *([n for n in there if k and kind_of(n) == k] for k in kinds)):
        if len(names) > 1:
            raise UserError(f"split {wanted!r} could be any of {listed(names)}; give its own name")
        if names:
            return names[0]
    return None


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return names for a message, the first few of many."""
    names = list(names)
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text}, … ({len(names)} in all)"
