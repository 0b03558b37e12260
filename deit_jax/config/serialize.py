"""A config's form on disk, and as one level of keys."""

import json
from typing import Any

from ml_collections import ConfigDict

# What it meant that a run has no such field: it began before there was one.
OLD_MEANING = {
    "data.skip_unreadable": False,
    "data.exif": False,
    "data.resize": "crop",
    "data.bits": 0,
}


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

    Fields that are newer than the run get what their absence meant.
    """

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    whole = tuples(values)
    for key, meaning in OLD_MEANING.items():
        group, _, field = key.partition(".")
        if group in whole:
            whole[group].setdefault(field, meaning)
    return ConfigDict(whole)


def default_fields() -> dict[str, Any]:
    """Return the fields of configs/base.py, flat."""
    from deit_jax.configs import base  # a config file, which is only read where it is asked for

    return flatten(to_json(base.get_config()))
