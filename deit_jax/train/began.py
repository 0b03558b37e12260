"""What a run keeps from its beginning, where a config leaves it open."""

import contextlib
from pathlib import PurePath

from ml_collections import ConfigDict

from deit_jax.config.serialize import BEFORE, from_json
from deit_jax.data.decoders import choose
from deit_jax.data.sources.assemble import NEWEST_RULES
from deit_jax.errors import UserError
from deit_jax.storage import exists, read_json, to_path


def resolved_decoder(name: str, workdir: PurePath | None) -> str:
    """Return what `data.decoder` means: auto is the run's own if it began, else the fastest."""
    began = workdir and workdir / "config.json"
    if name == "auto" and began and exists(began):
        with contextlib.suppress(UserError, KeyError, TypeError):  # which are told of later
            name = read_json(began)["data"]["decoder"]
    return choose(name).name


def resolved_rules(given: int | None, workdir: PurePath | None, teacher: ConfigDict) -> int:
    """Return what `data.rules` means: None are the run's own, its tape's, or else the newest."""
    if given is not None:
        return given
    with contextlib.suppress(UserError, KeyError, TypeError, OSError):  # are told of later
        if workdir and exists(workdir / "config.json"):
            return from_json(read_json(workdir / "config.json")).data.rules
        if teacher.tape == "replay":
            recorded = read_json(to_path(teacher.tape_path) / "tape.json")["fingerprint"]
            return recorded.get("data.rules", BEFORE["data.rules"])
    return NEWEST_RULES


def began_rising(workdir: PurePath | None) -> bool:
    """Return what `optim.may_rise` is unless it is given: what the run in `workdir` began with."""
    with contextlib.suppress(UserError, KeyError, TypeError):  # which are told of later
        if workdir and exists(workdir / "config.json"):
            return bool(from_json(read_json(workdir / "config.json")).optim.may_rise)
    return False
