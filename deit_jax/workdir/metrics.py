"""Metrics of a run while it trains: a progress bar, JSON lines and its trackers."""

import errno
import json
import logging
import math
import sys
import time
from pathlib import PurePath
from typing import Any

from tqdm import tqdm

from deit_jax.errors import UserError
from deit_jax.storage import backend, read_lines, write_lines
from deit_jax.workdir.trackers.follow import Following

log = logging.getLogger("deit_jax")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Lines:
    """Append records to a JSON-lines file; while the disk is full, hold them back."""

    def __init__(self, path: PurePath, kept: list[dict[str, Any]]):
        write_lines(path, kept)
        self._path, self._end, self._waiting = path, backend(path).append(path), b""

    def append(self, record: dict[str, Any]) -> None:
        """Write a record and those held back; raise UserError if the file is lost."""
        full, self._waiting = bool(self._waiting), self._waiting + json.dumps(record).encode()
        self._waiting += b"\n"
        try:
            self._end.append(self._waiting)
            self._waiting = b""
            return
        except OSError as error:
            if error.errno not in FULL:
                raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error
        if not full:
            log.warning("%s: the disk is full; lines are held back until it is not", self._path)

    def flush(self) -> None:
        """Return once all lines are where they are to be, in a bucket."""
        self._end.flush()

    def close(self) -> None:
        """Close the file; say so if lines could not be written."""
        self._end.close()
        if self._waiting:
            log.error("%s: the disk is full; its last lines are lost", self._path)


class MetricWriter:
    """Record a run's metrics from a step on, dropping what an earlier attempt wrote beyond it.

    `metrics.jsonl` holds what follows from the config and the step alone, so that a resumed run
    writes the very file of one that never stopped; `timing.jsonl` holds what depends on the
    machine. A value that is not finite is null there. Both go to the run's trackers too. Only one
    process of a run should have an active writer.
    """

    def __init__(
        self,
        workdir: PurePath,
        start_step: int,
        total_steps: int,
        active: bool,
        trackers: Following,
    ):
        self._active, self._trackers = active, trackers
        if not active:
            return
        self._files, before = {}, []
        try:
            for name in ("metrics", "timing"):
                path = workdir / f"{name}.jsonl"
                kept = [r for r in read_lines(path) if r["step"] <= start_step]
                self._files[name] = Lines(path, kept)
                before += kept
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error
        trackers.begin(start_step, before)
        tqdm.monitor_interval = 0  # or a thread of it would outlive the run
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=None,  # = where stderr is no terminal
        )

    def write(self, step: int, values: dict[str, float], kind: str = "metrics") -> None:
        """Append one record."""
        if not self._active:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._files[kind].append({"step": step, **finite})
        self._trackers.write(step, values)

    def advance(self, text: str | None = None) -> None:
        """Move the bar by one step."""
        if self._active:
            if text is not None:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    def flush(self) -> None:
        """Return once all that was written is safe: what is put into a bucket takes a moment."""
        if self._active:
            for file in self._files.values():
                file.flush()

    def close(self) -> None:
        """Flush and close everything."""
        if self._active:
            self._bar.close()
            for file in self._files.values():
                try:
                    file.close()
                except OSError as error:  # the state is what the run goes on from
                    log.error("%s: its last lines are lost (%s)", error.filename, error.strerror)


class Meter:
    """Measure images per second and the share of time spent waiting for input."""

    def __init__(self):
        self._start, self._images, self._wait = time.perf_counter(), 0, 0.0

    def waited(self, seconds: float) -> None:
        """Count time that the loop stood still for want of a batch."""
        self._wait += seconds

    def count(self, images: int) -> None:
        """Count images that a finished step used."""
        self._images += images

    def read(self) -> dict[str, float]:
        """Return the rates since the last reading and begin anew."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rates = {"images_per_second": self._images / elapsed, "input_wait": self._wait / elapsed}
        self._start, self._images, self._wait = time.perf_counter(), 0, 0.0
        return rates
