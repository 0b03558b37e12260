"""Compile a program once a process, however many tests ask for it.

Most of the suite's time is XLA compiling the same steps of the same small models: each Trainer jits
anew, and JAX knows jitted functions by their identity. Here they are known by their text, devices
and options. What comes back is the very executable, not one read from a file, so the bits are
those of one compilation, and what keeps programs of several CPU devices out of JAX's own cache on
disk (conftest.py) does not arise. To JAX's listeners a hit is a compilation, only a fast one.
"""

import ctypes
import gc
import time
from pathlib import Path

import jax

WORTHWHILE_S = 0.1  # what compiles in less is not kept: thousands of programs for single operations
MUCH_MB, TOO_MUCH_MB = 1000, 1300
_kept, _bound_mb = {}, MUCH_MB


def compile_once():
    """Put the memory in front of JAX's compiler; without it where a later JAX has it elsewhere."""
    try:
        from jax._src import compilation_cache, compiler

        compile_anew, key_of = compiler.compile_or_get_cached, compilation_cache.get_cache_key
    except (ImportError, AttributeError):
        return

    def compile_or_remember(backend, computation, devices, options, host_callbacks, *rest, **more):
        arguments = (backend, computation, devices, options, host_callbacks, *rest)
        # A function that a program calls back is known by its address, which another may get; and
        # a program of several processes is compiled by all of them together or by none.
        if host_callbacks or len({device.process_index for device in devices.flat}) > 1:
            return compile_anew(*arguments, **more)
        key = (id(backend), key_of(computation, devices, options, backend))
        if key in _kept:
            return _kept[key][0]
        began = time.perf_counter()
        program = compile_anew(*arguments, **more)
        if time.perf_counter() - began > WORTHWHILE_S:
            _kept[key] = program, backend  # which keeps its id its own
        return program

    compiler.compile_or_get_cached = compile_or_remember


def bound_memory():
    """Free what a worker need not hold, once it holds much more: two share a small machine.

    What the compiler has freed, which the C library keeps; if that is not all, JAX's caches of
    hundreds of tests; and at last the programs kept here.
    """
    global _bound_mb
    if _resident_mb() < _bound_mb:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # not everywhere glibc
    trim(0)
    for clear in (jax.clear_caches, _kept.clear):
        if _resident_mb() > TOO_MUCH_MB:
            clear()
            gc.collect()
            trim(0)
    _bound_mb = max(MUCH_MB, _resident_mb() + 200)  # or each of many small tests would try again


def _resident_mb() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []  # Linux only
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024
