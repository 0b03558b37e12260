"""A config's form on disk, and as one level of keys."""

import functools
import json
from typing import Any

from ml_collections import ConfigDict

# What a field meant before it was there, where that is not its default.
BEFORE = {"data.rules": 1, "optim.may_rise": True}


def flatten(tree) -> dict[str, Any]:
    """Return {"optim.lr": 0.001, …}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, (ConfigDict, dict)):
            flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Return plain nested dicts and lists with every reference resolved."""
    return json.loads(json.dumps(config.copy_and_resolve_references().to_dict()))


def from_json(values: dict[str, Any]) -> ConfigDict:
    """Return a config from `to_json`'s form; lists become tuples, as configs hold them.

    Fields that an older run lacks get what they meant then.
    """

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    config = ConfigDict(tuples(values))
    for key, meaning in meanings().items():
        *groups, field = key.split(".")
        place = functools.reduce(lambda c, g: c.get(g, {}), groups, config)
        if groups and isinstance(place, ConfigDict) and field not in place:
            place[field] = meaning
    return config


def default_fields() -> dict[str, Any]:
    """Return the fields of configs/base.py, flat."""
    from deit_jax.configs import base  # a config file, which is only read where it is asked for

    return flatten(to_json(base.get_config()))


def meanings() -> dict[str, Any]:
    """Return what each field means in the config of a run that is too old to have it."""
    return default_fields() | BEFORE
