"""Graceful stop on SIGTERM and SIGINT: a run ends at a step boundary, its state saved.

The first signal lets the step finish and the state be saved, the second ends the process at once.
So does the first while there is nothing to save yet. All processes of a run stop at the same step,
whichever of them is signalled.
"""

import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deit_jax.errors import EXIT_CODE

log = logging.getLogger("deit_jax")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether the run has been asked to stop. Never, unless `listening` made it."""

    def __init__(self):
        self.name = ""  # of the signal
        self.armed = False  # whether there is anything to save
        self._asked = None

    def agreed(self, mesh: Mesh) -> bool:
        """Return whether all processes are to stop now; all must call this equally often.

        One process answers for itself. Several combine their answers on the devices, in the order
        of the steps, and read what they combined at the call before: nobody waits.
        """
        if jax.process_count() == 1:
            return bool(self.name)
        asked, self._asked = self._asked, _any(mesh)(self._flags(mesh))
        return asked is not None and bool(asked)

    def _flags(self, mesh: Mesh) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        own = np.full(len(mesh.local_devices), bool(self.name))
        return jax.make_array_from_process_local_data(sharding, own)

    def watch(self, pipe: int) -> None:
        """Read the numbers of signals from a pipe until it is closed.

        A thread does this, as Python's own handlers wait for the main thread, which may be inside
        a compilation that takes minutes.
        """
        while number := os.read(pipe, 1):
            if number[0] not in SIGNALS:
                continue
            name = signal.Signals(number[0]).name
            if self.name:
                _exit(128 + number[0], f"a second signal, {name}: stopped without saving")
            if not self.armed:
                _exit(EXIT_CODE, f"{name}, with nothing to save")
            self.name = name
            log.warning("%s: finishing the step and saving; again = stop at once", name)


@functools.cache
def _any(mesh: Mesh):
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _exit(code: int, text: str) -> None:
    os.write(2, f"deit: {text}; the same command goes on from the last checkpoint\n".encode())
    os._exit(code)


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Take over SIGTERM and SIGINT, in the main thread; give them back at the end."""
    stop = StopRequest()
    read, write = os.pipe()
    if hasattr(os, "set_blocking"):  # Windows has it from Python 3.12 on, and does not insist on it
        os.set_blocking(write, False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=stop.watch, args=(read,), name="signals", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():  # None: a handler that Python did not install
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(write)
        thread.join()
        os.close(read)
