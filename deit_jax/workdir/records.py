"""Records of a run's workdir, finished or under way, read back: nothing is computed here."""

import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from deit_jax.errors import UserError
from deit_jax.storage import backend, exists, is_remote, read_json, read_lines, read_text

DATA_CARD = "data_card.json"
WINDOWS = sys.platform == "win32"
TABLE = re.compile(r"eval/((?:ema\.)?)(cls|dist|fused)\.(top[15]|mAP)")


def names(workdirs: Sequence[PurePath], flag: str = "--workdir") -> list[str]:
    """Return the shortest ends of the paths that tell them apart; raise UserError on a repetition.

    It names the `flag`. `runs/a/small` and `runs/b/small` are `a/small` and `b/small`.
    """
    paths = [(p.resolve() if isinstance(p, Path) else p).parts for p in workdirs]
    found = []
    for path, parts in zip(workdirs, paths, strict=True):
        others = [p for p in paths if p is not parts]
        if parts in others:
            raise UserError(f"{flag}: {path} is given twice")
        lengths = range(1, len(parts) + 1)
        least = next(n for n in lengths if all(p[-n:] != parts[-n:] for p in others))
        found.append("/".join(parts[-least:]))
    return found


def config_of(workdir: PurePath) -> dict[str, Any]:
    """Return the resolved config; raise UserError if no run is there."""
    if not exists(workdir / "config.json"):
        raise UserError(
            f"--workdir={workdir}: no run is there (no config.json); give the --workdir of a "
            "`deit train`"
        )
    return read_json(workdir / "config.json")


def data_card(workdir: PurePath) -> dict[str, Any] | None:
    """Return what is known of a run's data (data/card.py); None for a run of before."""
    path = workdir / DATA_CARD
    return read_json(path) if exists(path) else None


def read(workdir: PurePath) -> dict[str, Any]:
    """Return config, history, curves and accuracies of a run; what it has not yet is None."""
    config = config_of(workdir)
    records = read_lines(workdir / "metrics.jsonl")
    timing = read_lines(workdir / "timing.jsonl")
    step = max((r["step"] for r in (*records, *timing)), default=0)
    results = None
    if exists(workdir / "results.json"):
        results = read_json(workdir / "results.json")
        if results["step"] < step:  # of a run that was then told to train longer
            results = None
    return {
        "workdir": str(workdir),
        "model": config["model"]["name"],
        "source": config["data"]["source"],
        "distill": config["distill"]["kind"],
        "step": max(step, results["step"]) if results else step,
        "finished": results is not None,
        "under_way": under_way(workdir),
        "curves": {**curves(records), **curves(timing)},
        "accuracy": _from_results(results) if results else last_evaluation(records),
        "config": config,
        "history": read_lines(workdir / "history.jsonl"),
    }


def curves(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, list]]:
    """Return {key: {"step": […], "value": […]}}; a value that was not finite is None."""
    found: dict[str, dict[str, list]] = {}
    for record in records:
        for key, value in record.items():
            if key != "step":
                curve = found.setdefault(key, {"step": [], "value": []})
                curve["step"].append(record["step"])
                curve["value"].append(value)
    return found


def _from_results(results: dict[str, Any]) -> dict[str, Any]:
    heads = {k: v for k, v in results.items() if isinstance(v, dict) and k != "ema"}
    heads |= {f"ema.{k}": v for k, v in results.get("ema", {}).items()}
    return {"from": "results.json", "step": results["step"], "heads": heads}


def last_evaluation(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the accuracies of the newest evaluation in metrics.jsonl, None before the first."""
    for record in reversed(records):
        heads: dict[str, dict[str, float]] = {}
        for key, value in record.items():
            if match := TABLE.fullmatch(key):
                heads.setdefault(match[1] + match[2], {})[match[3]] = value
        if heads:
            return {"from": "metrics.jsonl", "step": record["step"], "heads": heads}
    return None


def under_way(workdir: PurePath) -> bool:
    """Return whether a process of this machine is training in the workdir.

    The lock's text tells who holds it. To try the lock would hold it, and a training that begins
    at that moment would be refused.
    """
    if is_remote(workdir):
        return backend(workdir).is_locked(workdir / "lock")
    try:
        text = read_text(workdir / "lock")
    except PermissionError:
        return WINDOWS  # where nobody may read what is locked
    except OSError:
        return False
    if WINDOWS:  # the lock's text outlives a process that was killed, and os.kill would end it
        return False
    found = re.match(r"process (\d+) on (\S+) since", text)
    if not found or found[2] != socket.gethostname() or int(found[1]) == os.getpid():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
