"""The trackers of a run: each step of each curve once, however often the run starts."""

import contextlib
import importlib
import importlib.util
import logging
import queue
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from deit_jax.errors import Interrupted, UserError
from deit_jax.storage import exists, read_json, write_json
from deit_jax.workdir.trackers import TRACKERS, named
from deit_jax.workdir.trackers.base import (
    EVERY,
    FAILED,
    FINISHED,
    PATIENCE_S,
    STOPPED,
    Followed,
    Tracker,
)

log = logging.getLogger("deit_jax")

FILE = "trackers.json"  # in the workdir, once a tracker needs it: the run's id
IDLE_S = 2.0  # after which what is known of a step is sent; evaluations add to it at once or late


def check_installed(field: Sequence[str]) -> None:
    """Raise UserError for a tracker in config.train.trackers whose packages are missing."""
    for name in named(field):
        for package in TRACKERS[name].packages:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:  # a mere folder, as W&B makes ./wandb
                raise UserError(
                    f"config.train.trackers={','.join(named(field))}: {name} needs {package}; "
                    f"pip install 'deit_jax[{name}]'"
                )


class Following:
    """The trackers of a run, none unless told; `write` never waits for one and never fails."""

    def __init__(self, run: Followed | None = None, names: Sequence[str] = ()):
        self._all: list[_Direct | _Beside] = []
        for name in names:
            assert run is not None
            entry = TRACKERS[name]
            kind = importlib.import_module(entry.module).Tracker
            self._all.append((_Beside if entry.beside else _Direct)(name, kind, run))

    def begin(self, step: int, records: Iterable[dict[str, Any]] = ()) -> None:
        """Go on from a step; `records` are those of the run up to it, {"step": …, key: value}.

        What a tracker lacks of them, as after a crash or where it is new to the run, is sent too.
        """
        rows: dict[int, dict[str, float]] = {}
        for record in records:
            values = {k: v for k, v in record.items() if k != "step" and v is not None}
            rows.setdefault(record["step"], {}).update(values)
        for one in self._all:
            one.begin(step, sorted(rows.items()))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add values of a step to the curves of each tracker that does not have them yet."""
        for one in self._all:
            one.write(step, values)

    def results(self, step: int, values: dict[str, float]) -> None:
        """Add what a run ended with, as results/…, to the trackers that show single figures."""
        for one in self._all:
            if isinstance(one, _Beside):
                one.write(step, {f"results/{key}": value for key, value in values.items()})

    def close(self, status: str) -> None:
        """Close the trackers; what is not done in time is left behind, with a warning."""
        for one in self._all:
            one.close(status)
        deadline = time.monotonic() + PATIENCE_S[status]
        for one in self._all:
            one.wait(deadline)


@contextlib.contextmanager
def following(
    workdir: PurePath, field: Sequence[str], fields: dict[str, Any], active: bool
) -> Iterator[Following]:
    """Open the trackers of a run, and close them with how it ends; none unless `active`.

    `field` is config.train.trackers, `fields` are all of the config, flat.
    """
    names = named(field) if active else ()
    beside = any(TRACKERS[name].beside for name in names)
    folder = workdir.absolute() if isinstance(workdir, Path) else None  # no bucket
    title = "/".join((folder or workdir).parts[-2:]).lstrip("/")
    run = Followed(_run_id(workdir) if beside else "", title, workdir, folder, fields)
    trackers = Following(run, names)
    status = FAILED
    try:
        yield trackers
        status = FINISHED
    except (Interrupted, KeyboardInterrupt):
        status = STOPPED
        raise
    finally:
        trackers.close(status)


def _run_id(workdir: PurePath) -> str:
    """Return the run's id, which its workdir keeps."""
    path, made = workdir / FILE, uuid.uuid4().hex[:12]
    try:
        if exists(path):
            return str(read_json(path)["id"])
        write_json(path, {"id": made})
    except (OSError, UserError, KeyError) as error:
        log.warning("%s: trackers know the run by a new id (%s)", path, error)
    return made


class _Direct:
    """A tracker that waits for nothing."""

    def __init__(self, name: str, kind: type[Tracker], run: Followed):
        self._tracker = kind(run)

    def begin(self, step: int, rows: list[tuple[int, dict[str, float]]]) -> None:
        self._tracker.begin(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._tracker.write(step, values)

    def close(self, status: str) -> None:
        self._tracker.close(status)

    def wait(self, deadline: float) -> None:
        pass


class _Beside:
    """A tracker in a thread of its own, which may be slow, fail or hang."""

    def __init__(self, name: str, kind: type[Tracker], run: Followed):
        self._name, self._kind, self._run = name, kind, run
        self._told = self._lost = False
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def begin(self, step: int, rows: list[tuple[int, dict[str, float]]]) -> None:
        self._calls.put(("begin", step, None))
        for number, values in rows:
            self.write(number, values)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._lost:
            self._calls.put(("write", step, values))

    def close(self, status: str) -> None:
        self._calls.put(("close", 0, status))

    def wait(self, deadline: float) -> None:
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            log.warning("tracker %s: not done in time; what it has not sent is lost", self._name)

    def _work(self) -> None:
        sender = None
        with self._guarded():
            tracker = self._kind(self._run)
            sender = _Sender(tracker, tracker.last())
        if sender is None:
            self._lost = True
        else:
            self._serve(tracker, sender)

    def _serve(self, tracker: Tracker, sender: "_Sender") -> None:
        while True:
            try:
                call, step, given = self._calls.get(timeout=IDLE_S)
            except queue.Empty:
                call, step, given = "idle", 0, None
            if call == "write":
                if step != sender.step:
                    with self._guarded():
                        sender.flush()
                sender.add(step, given)
                continue
            with self._guarded():
                sender.flush()
            if call == "begin":
                with self._guarded():
                    tracker.begin(step)
            elif call == "close":
                with self._guarded():
                    tracker.close(given)
                return

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Tell the first thing that goes wrong, and go on after any."""
        try:
            yield
        except (Exception, SystemExit) as error:  # it is somebody else's code, and not the run's
            if not self._told:
                first = next(iter(str(error).splitlines()), "") or type(error).__name__
                log.warning(
                    "tracker %s: %s; the run goes on, and metrics.jsonl has all", self._name, first
                )
            self._told = True


class _Sender:
    """The values of a step, sent together, each key of each step once."""

    def __init__(self, tracker: Tracker, last: dict[str, int]):
        self._tracker, self._last, self.step = tracker, dict(last), 0
        self._values: dict[str, float] = {}

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add values to those of a step; what was of another one has been sent."""
        floor = self._last.get(EVERY, -1)
        named = {self._tracker.key(k): v for k, v in values.items()}
        new = {k: v for k, v in named.items() if step > self._last.get(k, floor)}
        self._last.update(dict.fromkeys(new, step))
        self.step = step
        self._values.update(new)

    def flush(self) -> None:
        """Send what is known of the last step."""
        values, self._values = self._values, {}
        if values:
            self._tracker.write(self.step, values)
