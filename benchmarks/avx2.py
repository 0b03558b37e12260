"""JAX and PyTorch as on a CPU without AVX-512, on a CPU that has it.

    python -m benchmarks.avx2 DIR && PYTHONPATH=DIR python -m benchmarks.cpu

XLA's flag --xla_cpu_max_isa=AVX2 does not stand in for such a machine: products come from libraries
that ask the processor themselves. They all ask whether the system saves the wide registers, by the
instruction xgetbv. DIR gets jaxlib and torch (links to the installed files where they can be), in
whose libraries the answer is that it saves the registers of AVX alone. x86-64 only.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

XGETBV = b"\x0f\x01\xd0"
SAY_AVX = b"\xb0\x07\x90"  # mov al, 7; nop: x87, SSE and AVX in the mask that xgetbv would return
PACKAGES = {"jaxlib": ("libjax_common.so",), "torch": ("libtorch_cpu.so", "libc10.so")}


def without_avx512(library: bytes) -> bytes:
    """Return a library that believes the wide registers are not saved."""
    return library.replace(XGETBV, SAY_AVX)


def link(source: str, target: str) -> None:
    """Link a file, or copy it to another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def make(folder: Path) -> None:
    """Write the two packages into a new folder."""
    for name, libraries in PACKAGES.items():
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        installed = Path(spec.origin).parent
        shutil.copytree(installed, folder / name, copy_function=link)
        for path in (p for p in (folder / name).rglob("*.so") if p.name in libraries):
            patched = without_avx512(path.read_bytes())
            path.unlink()  # not written to: the installed file is the same one
            path.write_bytes(patched)


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
