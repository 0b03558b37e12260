"""A run's curves in TensorBoard's files."""

import contextlib
import time

from tensorboardX import record_writer
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from deit_jax.storage import backend, to_path
from deit_jax.workdir.trackers import base


class _InBucket:
    """How tensorboardX opens files in a bucket: its own writer would hold up every step."""

    @staticmethod
    def open(path: str) -> "_End":
        return _End(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """Make nothing: a bucket has no folders."""


class _End:
    """A file for tensorboardX, whose bytes are put into a bucket in the background."""

    def __init__(self, path: str):
        self._end = backend(to_path(path)).create(to_path(path))

    def write(self, data: bytes) -> None:
        self._end.append(bytes(data))

    def flush(self) -> None:
        """Do nothing: it is called after every event, and close puts what is left."""

    def close(self) -> None:
        self._end.close()


record_writer.register_writer_factory("gs", _InBucket)


class Tracker(base.Tracker):
    """Write TensorBoard's files, without the threads of its own writer, and never stop for them."""

    def __init__(self, run: base.Followed):
        super().__init__(run)
        self._directory = run.workdir / "tensorboard"
        self._writer: EventsWriter | None = None

    def begin(self, step: int) -> None:
        """Begin a file that tells TensorBoard to drop what was written beyond a step."""
        self._close()
        purge_step = step + 1
        self._add(Event(step=purge_step, file_version="brain.Event:2", wall_time=time.time()))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(step=purge_step, session_log=start, wall_time=time.time()))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add points to curves."""
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._add(Event(step=step, summary=summary, wall_time=time.time()))

    def close(self, status: str) -> None:
        """Close the file."""
        self._close()

    def _add(self, event) -> None:
        try:
            if self._writer is None:
                backend(self._directory).make_folder(self._directory)
                self._writer = EventsWriter(str(self._directory / "events"))
            self._writer.write_event(event)
            self._writer.flush()
        except OSError:  # as on a full disk: a record cut short spoils the rest of its file
            self._writer = None

    def _close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None
