"""Weights & Biases: offline in WORKDIR/wandb where there is no key, for `wandb sync` to send.

WANDB_API_KEY or `wandb login`, WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME and WANDB_DIR
work as ever.
"""

import json
import netrc
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deit_jax.storage import backend
from deit_jax.workdir.trackers import base

STEP = "step"  # the axis of all curves; W&B's own counter only ever grows
_FINISH_S = 30.0  # for which W&B sends at the end; `wandb sync` sends what is left on the disk
_HEADER, _BLOCK = 7, 32768  # of its files: LevelDB's log, behind a header of its own


class Tracker(base.Tracker):
    """A run of W&B with our id, which is taken up again by it."""

    def __init__(self, run: base.Followed):
        super().__init__(run)
        import wandb

        offline = not os.environ.get("WANDB_MODE") and not _has_key()
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            reinit="create_new",  # a program that uses us may have a run of its own
            finish_timeout=_FINISH_S,
            finish_timeout_raises=False,
        )
        self._wandb = wandb.init(
            project=os.environ.get("WANDB_PROJECT", base.PROJECT),
            id=run.id,
            name=os.environ.get("WANDB_NAME", run.name),
            dir=None if os.environ.get("WANDB_DIR") else run.folder,
            config=run.fields,
            resume="allow",
            mode="offline" if offline else None,
            settings=settings,
        )
        self._wandb.define_metric(STEP, hidden=True)
        self._wandb.define_metric("*", step_metric=STEP)
        self._next = self._wandb.step

    def last(self) -> dict[str, int]:
        """Return what the files of earlier starts hold and, online, what the server knows."""
        found: dict[str, int] = {}
        folder = Path(self._wandb.dir).parent.parent  # …/wandb/offline-run-DATE-ID/files
        for name in backend(folder).names(folder):
            if name.endswith(f"-{self.run.id}"):
                path = folder / name / f"run-{self.run.id}.wandb"
                for row in _history(path):
                    self._next = max(self._next, int(row.get("_step", 0)) + 1)
                    found |= {key: max(found.get(key, -1), int(row[STEP])) for key in row}
        if self._wandb.resumed and (known := self._wandb.summary.get(STEP)) is not None:
            found[base.EVERY] = int(known)
            found = {key: max(step, int(known)) for key, step in found.items()}
        return found

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a row."""
        self._next = max(self._next, step)
        self._wandb.log({**values, STEP: step}, step=self._next, commit=True)
        self._next += 1

    def close(self, status: str) -> None:
        """Write and send what is left, as long as a run waits for it."""
        self._wandb.finish(exit_code=0 if status == base.FINISHED else 1)


def _has_key() -> bool:
    """Return whether there is a key for W&B's server: of the environment, or of `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows with a step that a run's file holds, as far as a crash let it be written."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    disk = backend(path)
    for content in _records(disk.read(path) if disk.exists(path) else b""):
        items = Record.FromString(content).history.item
        row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
        if STEP in row:
            yield row


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format: blocks of parts, each whole, first … last."""
    position, begun = _HEADER, b""
    while position + 7 <= len(data):
        if (left := _BLOCK - position % _BLOCK) < 7:
            position += left  # too short for the head of another part
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + length]
        if len(part) < length or kind not in (1, 2, 3, 4):
            return
        position += 7 + length
        begun = part if kind in (1, 2) else begun + part
        if kind in (1, 4):
            yield begun
