"""A lock in a bucket: an object that its holder renews, and that others may take once it does not.

The object is written only if it is still of the generation that was read (a precondition that the
bucket checks), so that of two processes one has it. It holds who has it. A process that was killed
renews it no more: the same machine sees that the process is gone, another one waits and watches.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from deit_jax.storage.gcs import Objects
from deit_jax.storage.local import LockedError
from deit_jax.storage.objects import Conflict

log = logging.getLogger("deit_jax")

RENEWED = 15.0  # seconds between two renewals
EXPIRES = 90.0  # without a renewal for so many seconds, another process may take it
TRUSTED = 45.0  # seconds after a renewal in which the holder need not ask whether it still has it
TRY = 15.0  # seconds for which a put is tried before that is asked again; with what hangs, 45
FREE = b"{}"  # what the object holds when nobody has the lock
WATCHED = 2.0  # seconds between two looks at another process's


class Lease:
    """The lock that the object `name` is, for the process that is `holder`."""

    def __init__(self, objects: Objects, name: str, holder: str):
        self._objects, self._name = objects, name
        self._text = {"holder": holder, "token": uuid.uuid4().hex, "process": _this_process()}
        self._generation = 0
        self._renewed = 0.0
        self._lost = False
        self._guard, self._ended = threading.Lock(), threading.Event()

    def take(self) -> None:
        """Have the lock; raise LockedError, which names who has it, where another process does."""
        generation, there = self._look()
        if there and not _is_gone(there):
            generation = self._wait(generation, there)
        try:
            self._write(generation)
        except Conflict:
            _, there = self._look()
            raise LockedError(there.get("holder", "another process, as of now")) from None
        threading.Thread(target=self._renew_always, daemon=True, name="deit-lease").start()

    def _look(self) -> tuple[Any, dict[str, Any]]:
        """Return the object's generation and content: 0 and {} without any."""
        state = self._objects.state(self._name)
        if state is None:
            return 0, {}
        try:
            data, generation = self._objects.read(self._name)
            return generation or state[0], json.loads(data)
        except FileNotFoundError:
            return 0, {}
        except ValueError:  # of somebody else, or just being written
            return state[0], {"holder": "not known"}

    def _wait(self, generation: int, there: dict[str, Any]) -> int:
        """Wait until another process's lease has expired; raise LockedError once it is renewed."""
        end, told = time.monotonic() + EXPIRES, False
        while time.monotonic() < end:
            time.sleep(WATCHED)
            state = self._objects.state(self._name)
            if state is None or (state[0] != generation and not self._look()[1]):
                return 0 if state is None else state[0]  # it was given back
            if state[0] != generation:
                raise LockedError(there.get("holder", "not known"))
            if not told:
                told = True
                log.warning(
                    "gs://%s: held by %s; it is taken over if that one says nothing for %.0f s",
                    *(self._name, there.get("holder", "not known"), EXPIRES),
                )
        return generation

    def _write(self, generation: int) -> None:
        began = time.time()
        data = json.dumps({**self._text, "renewed": began}).encode()
        try:
            self._generation = self._objects.put(self._name, data, generation)
        except Conflict:
            # A put whose answer was lost is tried again, and meets what it has itself written.
            now, there = self._look()
            if there.get("token") != self._text["token"]:
                raise
            self._generation = now
        self._renewed = began

    def must_be_held(self) -> None:
        """Raise OSError if another process has the lock; ask the bucket only if it may."""
        with self._guard:
            if not self._lost and abs(time.time() - self._renewed) > TRUSTED:
                self._renew()
            if self._lost:
                where = f"gs://{self._name.rpartition('/')[0]}"
                text = "another process has taken it over, as this one was not heard of for long"
                raise OSError(errno.ESTALE, text, where)

    def _renew(self) -> None:
        try:
            self._write(self._generation)
        except Conflict:
            self._lost = True

    def _renew_always(self) -> None:
        while not self._ended.wait(RENEWED):
            with self._guard:
                if self._lost or self._ended.is_set():
                    return
                # What fails is told of by what is written next, which asks again.
                with contextlib.suppress(OSError):
                    self._renew()

    def release(self) -> None:
        """Give the lock back, if it is still had."""
        self._ended.set()
        with self._guard, contextlib.suppress(OSError):
            if not self._lost:
                self._objects.put(self._name, FREE, self._generation, TRY)


def is_held(data: bytes) -> bool:
    """Return whether the content of a lease is of a process that still renews it, by the clocks."""
    try:
        there = json.loads(data)
        recent = bool(there) and abs(time.time() - there["renewed"]) < EXPIRES
        return recent and not _is_gone(there)
    except (ValueError, KeyError, TypeError):
        return False


def _this_process() -> dict[str, Any]:
    """Return what tells this process from all others, on this machine and elsewhere."""
    return {"pid": os.getpid(), "started": _started(os.getpid()), "machine": _machine()}


def _machine() -> str | None:
    """Return what tells this start of this machine, and its process numbers; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process of this machine was started, in the kernel's count; None if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_gone(there: dict[str, Any]) -> bool:
    """Return whether who has a lease is known to be gone: a process of this start of this machine.

    No clock is asked: a machine whose own is wrong would take what is held.
    """
    who = there.get("process") or {}
    if not who.get("machine") or who["machine"] != _machine():
        return False
    if (started := _started(who["pid"])) is not None:
        return started != who["started"]
    try:
        os.kill(who["pid"], 0)  # /proc may hide other people's processes
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
