"""The choice of JAX's platform, before JAX is loaded, and a word on a GPU that it would miss.

JAX asks every plugin that is installed. libtpu, which `deit plan` needs on machines without a TPU,
then writes a page of harmless errors, and can crash the profiler.
"""

import glob
import importlib.util
import os
import re
from pathlib import Path

VARIABLE = "JAX_PLATFORMS"
# Device files of TPUs: before v5e, and since.
TPUS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
NVIDIA = ("/dev/nvidia[0-9]*", "/dev/dxg")  # the latter in WSL2
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
OTHER_PLUGINS = ("jax_rocm60_plugin", "jax_rocm7_plugin", "jax_plugins", "jax_metal")
DRIVER = Path("/proc/driver/nvidia/version")
CUDA_13_DRIVER = 580  # the oldest that CUDA 13 runs with; CUDA 12 asks for 525


def choose() -> str:
    """Keep JAX from libtpu where there is no TPU; return a line on a GPU that it would miss, or "".

    Nothing happens, and nothing is missed, where JAX_PLATFORMS says what to use. To be called
    before JAX is imported.
    """
    if os.environ.get(VARIABLE):
        return ""
    cuda, missed = any(map(_installed, CUDA_PLUGINS)), missed_gpu()
    unwanted_libtpu = _installed("libtpu") and not (_any(TPUS) or _told_of_a_tpu())
    if cuda and unwanted_libtpu:
        # With a list JAX insists on each of them, so only with a GPU.
        os.environ[VARIABLE] = "cuda,cpu" if _nvidia() else "cpu"
    elif missed or (unwanted_libtpu and not any(map(_installed, OTHER_PLUGINS))):
        os.environ[VARIABLE] = "cpu"
    return missed


def missed_gpu() -> str:
    """Return what to install for an NVIDIA GPU that JAX has no plugin for, "" if none is missed."""
    plugins = (*CUDA_PLUGINS, *OTHER_PLUGINS)
    if not _nvidia() or _any(TPUS) or any(map(_installed, plugins)):
        return ""
    driver = _driver()
    extra = "cuda12" if driver and driver < CUDA_13_DRIVER else "cuda13"
    return (
        "there is an NVIDIA GPU, but JAX has no CUDA plugin, so that the CPU computes: "
        f'pip install "jax[{extra}]"'
    )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _nvidia() -> bool:
    """Return whether there is an NVIDIA GPU that this process may use."""
    return _any(NVIDIA) and os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() not in ("", "-1")


def _any(patterns: tuple[str, ...]) -> bool:
    return any(map(glob.glob, patterns))


def _told_of_a_tpu() -> bool:
    """Return whether the environment names a TPU, as on a Cloud TPU VM or a pod of GKE."""
    ours = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")
    return any(name.startswith("TPU_") and name not in ours for name in os.environ)


def _driver() -> int | None:
    """Return the major version of NVIDIA's driver, None if it is not known."""
    try:
        found = re.search(r"Module\D+(\d+)\.", DRIVER.read_text())
    except OSError:
        return None
    return int(found[1]) if found else None
