"""Model names (timm's) and what stands behind each: architecture and input convention."""

import dataclasses
import difflib
import fnmatch
from typing import Any

from flax import linen as nn

from deit_jax.models import deit, efficientnet_lite, limits, regnet
from deit_jax.models.family import Family, ModelSpec
from deit_jax.shapes import simplest

FAMILIES: dict[str, Family] = {
    "deit": deit.FAMILY,
    "regnet": regnet.FAMILY,
    "efficientnet_lite": efficientnet_lite.FAMILY,
}


def specs() -> dict[str, ModelSpec]:
    """Return what stands behind every registered name."""
    return {name: spec for family in FAMILIES.values() for name, spec in family.specs.items()}


def family_of(model: nn.Module) -> Family:
    """Return the family that a model belongs to."""
    return next(family for family in FAMILIES.values() if type(model) is family.cls)


def list_models(pattern: str = "*") -> list[str]:
    """Return the registered names that match a shell pattern such as `deit_*distilled*`."""
    return sorted(fnmatch.filter(specs(), pattern))


def get_spec(name: str) -> ModelSpec:
    """Return the spec of a registered name; raise ValueError with the nearest names otherwise."""
    known = specs()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "see deit_jax.list_models()"
        raise ValueError(f"unknown model {name!r}: {hint}")
    return known[name]


def create_model(name: str, num_classes: int = 1000, **overrides: Any) -> nn.Module:
    """Build the Flax module of a registered name; overrides replace its architecture's fields.

    Raise ValueError for an unknown name or a field that the architecture does not have.
    """
    spec = get_spec(name)
    fields = {f.name for f in dataclasses.fields(spec.cls)} - {"parent", "name"}
    for key, value in overrides.items():
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ValueError(
                f"model.{key}={value!r:.60}: {name} has no such field; leave it out "
                f"(it has {known})"
            )
    if "image_size" in overrides:
        limits.check_sides(overrides["image_size"])
        overrides["image_size"] = simplest(overrides["image_size"])
    return spec.cls(num_classes=num_classes, **(spec.kwargs | overrides))
