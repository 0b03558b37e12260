"""Memory in large pages that is kept from step to step: on a CPU, a third of a step's time."""

import glob
import os
import sys

KEPT = 2**32  # bytes of one block, and free at the end, that do not go back to the system
VARIABLE = "GLIBC_TUNABLES"
VALUE = (
    f"glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold={KEPT}:"
    f"glibc.malloc.trim_threshold={KEPT}"
)
# GPUs of NVIDIA and AMD, TPUs. To be wrong about them costs some speed and nothing else.
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def restart() -> None:
    """Start this program again, as it was called, with such memory from the C library.

    XLA on a CPU asks for a step's whole temporary memory anew in every step; in pages of 4 kB
    that is tens of thousands of page faults, and then misses of the address cache. Large pages
    that go back after each step still have to be filled with zeros for the next. One arena for
    all threads, as only the first may hold a block of any size. The C library asks the kernel for
    large pages only if the environment said so before it was loaded (glibc 2.35, madvise(2)).

    Nothing happens where GLIBC_TUNABLES is set, be it to nothing, on systems other than Linux, and
    beside an accelerator: loading images gains nothing from it.
    """
    if sys.platform != "linux" or VARIABLE in os.environ or not sys.executable:
        return
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(glob.glob, ACCELERATORS)):
        return
    os.environ[VARIABLE] = VALUE
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
