"""Trackio: on this machine (TRACKIO_DIR), unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names one.

TRACKIO_PROJECT names the project.
"""

import importlib
import logging
import os

from deit_jax.workdir.trackers import base

log = logging.getLogger("deit_jax")

# Its modules that print, and that tell by warnings what goes wrong.
_SPEAKERS = ("trackio", "trackio.run", "trackio.utils")


class Tracker(base.Tracker):
    """A run of Trackio, which is taken up again by its name."""

    def __init__(self, run: base.Followed):
        super().__init__(run)
        for name in _SPEAKERS:  # stdout is the command's own; redirecting it would be all threads'
            module = importlib.import_module(name)
            module.print = _unsaid  # type: ignore[attr-defined]
            module._emit_nonfatal_warning = _tell  # type: ignore[attr-defined]
        import trackio

        self._project = os.environ.get("TRACKIO_PROJECT", base.PROJECT)
        self._run = trackio.init(
            self._project,
            name=f"{run.name} {run.id}",
            config=run.fields,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def last(self) -> dict[str, int]:
        """Return the last step of each key in the local data base, or of all on a server."""
        if not self._run._is_local:
            return {base.EVERY: self._run._next_step - 1}
        from trackio.sqlite_storage import SQLiteStorage

        found: dict[str, int] = {}
        for row in SQLiteStorage.get_logs(self._project, self._run.name, run_id=self._run.id):
            found |= {key: max(found.get(key, -1), row["step"]) for key in row}
        return found

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a row."""
        self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        """Write what is left."""
        self._run.finish()


def _unsaid(*words, **options) -> None:
    pass


def _tell(message: str, *rest, **options) -> None:
    first = next(iter(str(message).splitlines()), "")
    log.warning("tracker trackio: %s", first)
