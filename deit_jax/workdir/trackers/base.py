"""What a tracker is: it is opened for a run, given values by step, and closed."""

import dataclasses
from pathlib import Path, PurePath
from typing import Any

EVERY = ""  # in Tracker.last: all keys that are not named
PROJECT = "deit_jax"  # where a tracker keeps runs, unless its own variable names another
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
PATIENCE_S = {FINISHED: 120.0, STOPPED: 10.0, FAILED: 10.0}  # for which a run waits at its end


@dataclasses.dataclass(frozen=True)
class Followed:
    """A run as trackers know it: an id that starts do not change, a name, the config's fields.

    `folder` is the workdir if it is on a disk of this machine, None if it is elsewhere.
    """

    id: str
    name: str
    workdir: PurePath
    folder: Path | None
    fields: dict[str, Any]


class Tracker:
    """One tracker of one run; what it raises is told once, and the run goes on.

    Opening takes up the run of the same id if there is one. All calls come from one thread.
    """

    def __init__(self, run: Followed):
        self.run = run

    def key(self, name: str) -> str:
        """Return the name of a curve in the letters that the tracker allows."""
        return name

    def last(self) -> dict[str, int]:
        """Return the last step that the tracker has of each key, under EVERY of all others."""
        return {}

    def begin(self, step: int) -> None:
        """Note that the run goes on from a step, after a start or a rollback."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add points to curves: values of one step, which have not been written before."""
        raise NotImplementedError

    def close(self, status: str) -> None:
        """Close the tracker, with how the run ended: FINISHED, STOPPED or FAILED."""
