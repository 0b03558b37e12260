"""Which of a data set's splits is meant, whatever it calls them."""

from collections.abc import Sequence

# The names that a split of one kind goes by, the usual one first.
KINDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


def choose_split(wanted: str, there: Sequence[str]) -> str | None:
    """Return the split of `there` that `wanted` means; None if there is none.

    That of the very name, else one of the same kind in any usual name or capitals. What is wanted
    for validation may be a test split where there is no other.
    """
    if wanted in there:
        return wanted
    lower = {name.lower(): name for name in reversed(there)}
    kind = next((k for k, names in KINDS.items() if wanted.lower() in names), None)
    names = (wanted.lower(), *KINDS.get(kind or "", ()))
    if kind == "validation":
        names += KINDS["test"]
    return next((lower[name] for name in names if name in lower), None)
