"""Cores, memory, large pages, and the places where runs and compiled programs are kept."""

import os
import sys
import tempfile
import time
from pathlib import Path

from deit_jax.data.loader import usable_cores
from deit_jax.doctor.findings import NOTE, WRONG, Finding
from deit_jax.errors import UserError
from deit_jax.storage import backend, is_remote, to_path

FEW_GB = 4.0  # below, even small trainings meet their end without a word
FREE_GB = 6.0  # a checkpoint of DeiT-B is 1.4 GB, and four may be there at once
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "lustre", "gpfs", "beegfs", "ceph")


def look(cache: str | None) -> list[Finding]:
    """Return findings on the machine; `cache` is where compiled programs are kept, None if not."""
    return [_cores(), _memory(), _large_pages(), _compile_cache(cache)]


def _cores() -> Finding:
    usable, all_of_them, quota = usable_cores(), os.cpu_count() or 1, _quota()
    facts = {"usable": usable, "cores": all_of_them, "quota": quota}
    text = f"{usable} of {all_of_them} usable"
    if quota and quota < usable:
        return Finding(
            "cores",
            f"{text}, but the container may use {quota:g} at a time",
            NOTE,
            "raise its CPU limit, or set --config.data.threads to it",
            facts,
        )
    return Finding("cores", text, facts=facts)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _quota() -> float | None:
    """Return how many cores' time a control group may use, None without a limit."""
    words = _read("/sys/fs/cgroup/cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    return None


def memory() -> dict[str, float]:
    """Return {"total", "available", "limit"} in bytes, what is not known left out."""
    found = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            found["total" if name == "MemTotal" else "available"] = int(rest.split()[0]) * 1024.0
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["total"] = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        found["limit"] = float(limit)
        used = _read("/sys/fs/cgroup/memory.current").strip()
        if used.isdigit():
            left = float(limit) - float(used)
            found["available"] = min(found.get("available", left), left)
    return found


def _memory() -> Finding:
    found = memory()
    if not found:
        return Finding("memory", "not known on this system")
    text = ", ".join(f"{size / 1e9:.1f} GB {name}" for name, size in found.items())
    free = found.get("available", found.get("total", 0.0)) / 1e9
    if free < FEW_GB:
        remedy = "end other programs, or raise the limit: who has no memory is killed wordlessly"
        return Finding("memory", text, NOTE, remedy, found)
    return Finding("memory", text, facts=found)


def _large_pages() -> Finding:
    """Return whether the C library may have large pages, which a CPU's step is faster with."""
    if sys.platform != "linux":
        return Finding("large pages", "a matter of Linux")
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = setting.partition("[")[2].partition("]")[0]
    facts = {"transparent_hugepage": chosen}
    if chosen == "never":
        return Finding(
            "large pages",
            "switched off in the kernel: a CPU's step takes half as long again",
            NOTE,
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
            facts,
        )
    return Finding("large pages", chosen or "not known", facts=facts)


def file_system(path: Path) -> str:
    """Return the kind of file system that a path lies on, "" where that is not known."""
    best, kind = "", ""
    for line in _read("/proc/self/mounts").splitlines():
        words = line.split()
        where = words[1].replace("\\040", " ")
        inside = str(path) == where or str(path).startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best):
            best, kind = where, words[2]
    return kind


def workdir(text: str) -> Finding:
    """Return whether a workdir can be written, on what kind of file system, and the room there."""
    topic = "workdir"
    path = to_path(text)
    try:
        if is_remote(path):
            backend(path).must_take_files(path)
            return Finding(topic, f"{text}: a bucket that can be written")
        there = Path(text).expanduser().absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        kind = file_system(there.resolve())
        began = time.perf_counter()
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "name another --workdir, or make it writable"
        return Finding(topic, f"{text}: cannot be written ({reason})", WRONG, remedy)
    return _room(text, there, kind, seconds)


def _room(text: str, there: Path, kind: str, seconds: float) -> Finding:
    import shutil

    free = shutil.disk_usage(there).free
    facts = {"file_system": kind, "free": free, "fsync_1MB_seconds": round(seconds, 4)}
    said = f"{text}: {free / 1e9:.0f} GB free{f' on {kind}' if kind else ''}"
    if free < FREE_GB * 1e9:
        remedy = "make room: a checkpoint of DeiT-B takes 1.4 GB, and up to four are there at once"
        return Finding("workdir", said, NOTE, remedy, facts)
    if kind.startswith(NETWORK) or kind.startswith("fuse"):
        remedy = (
            "see to it that no two machines train in one workdir: not every such file system has "
            "locks; for a bucket give gs://… itself"
        )
        return Finding("workdir", f"{said}, a file system of a network", NOTE, remedy, facts)
    return Finding("workdir", said, facts=facts)


def _compile_cache(place: str | None) -> Finding:
    topic = "compiled programs"
    if place is None:
        remedy = "unset JAX_ENABLE_COMPILATION_CACHE, so that the next start need not compile"
        return Finding(topic, "are not kept", NOTE, remedy)
    if "://" in place:
        return Finding(topic, f"in {place}")
    folder = Path(place)
    files = [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    size = sum(p.stat().st_size for p in files)
    facts = {"folder": str(folder), "bytes": size, "files": len(files)}
    text = f"{len(files)} files, {size / 1e9:.2f} GB in {folder}"
    if size > 50e9:
        return Finding(topic, text, NOTE, f"rm -r {folder} (they are made anew)", facts)
    return Finding(topic, text, facts=facts)
