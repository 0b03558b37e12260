"""What a machine has for benchmarks/gpu_check.py, and what it is lent for the time of a run."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".gpu/wheels"
TOOLKIT, LIBDEVICE = Path("/usr/local/cuda"), "nvvm/libdevice/libdevice.10.bc"
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12"),
    *("nvidia-cudnn-cu13", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "torch", "timm"),
)
SMI = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"


def install_what_is_missing(folder: Path) -> list[str]:
    """Install from WHEELS the packages that this interpreter lacks; return their names.

    They come into a folder of their own, which processes that start later find too.
    """
    sys.path.append(str(folder))
    missing = []
    for wheel in sorted(WHEELS.glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(wheel)
    if missing:
        words = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
        command = [sys.executable, "-m", "pip", *words, "--target", str(folder), *map(str, missing)]
        if subprocess.run(command).returncode:
            sys.exit(f"the wheels of {WHEELS} are not for this Python; see gpu_prepare.sh")
    return [wheel.name.split("-")[0] for wheel in missing]


def cuda_root(folder: Path) -> str:
    """Return a CUDA folder with libdevice where JAX would find none, "" where it needs no help.

    JAX looks into its own wheels (nvidia-cuda-nvcc, nvidia-nvvm), XLA into /usr/local/cuda. Images
    without either often have Triton, which brings the same two files.
    """
    wheels = importlib.util.find_spec("nvidia")
    for root in wheels.submodule_search_locations if wheels else ():
        for name in ("cu13", "cuda_nvcc"):
            if (Path(root, name, LIBDEVICE)).exists() and Path(root, name, "bin/ptxas").exists():
                return ""
    nvcc = shutil.which("nvcc")
    for root in filter(None, (nvcc and Path(nvcc).resolve().parents[1], TOOLKIT)):
        if (root / LIBDEVICE).exists():
            return str(root)
    spec = importlib.util.find_spec("triton")
    if not spec or not spec.origin:
        return ""
    theirs = Path(spec.origin).parent / "backends/nvidia"
    files = {theirs / "lib/libdevice.10.bc": folder / LIBDEVICE}
    files[theirs / "bin/ptxas"] = folder / "bin/ptxas"
    if not all(source.exists() for source in files):
        return ""
    for source, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return str(folder)


def environment() -> dict:
    """Return what this machine has, as JAX and nvidia-smi see it."""
    import jax

    from deit_jax.parallel import devices

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    smi = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
    told = None
    with contextlib.suppress(OSError):
        told = subprocess.run(smi, capture_output=True, text=True).stdout.strip()
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "devices": len(jax.devices()),
        "compute_capability": getattr(device, "compute_capability", None),
        "memory": devices.memory_stats(device),
        "nvidia_smi": told,
        "cuda_root": os.environ.get("CUDA_ROOT"),
        "python": platform.python_version(),
        "versions": versions,
    }
