"""Copies of what lies in a bucket on this machine's disk: for data and weights, read at random.

An image at a time, a bucket answers in tens of milliseconds and bills every request; an epoch asks
a million times. So what is to be read is copied once, many objects at a time, and read here. A copy
is of the objects as they are then: another content is another copy.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from deit_jax.errors import UserError
from deit_jax.storage.objects import Found, name_of

AT_A_TIME = 32  # objects on their way
SPARE = 1 << 30  # bytes that a copy leaves free


def cache_folder() -> Path:
    """Return the folder of this machine that may be emptied at any time.

    Raise RuntimeError where there is no home. XDG_CACHE_HOME counts only if it is absolute.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    base = Path(named) if named and Path(named).is_absolute() else Path.home() / ".cache"
    return base / "deit_jax"


def fetched(text: str, objects: Any) -> Path:
    """Return a copy of the file or folder gs://bucket/a/b on this machine, made if need be.

    Its last name is that in the bucket. Where nothing lies there, return a path with nothing at it.
    Raise UserError where it cannot be read, or there is no room for it.
    """
    name = name_of(text)
    try:
        found = _found(objects, name)
    except OSError as error:
        raise UserError(f"{text}: cannot be read ({error.strerror or error})") from error
    key = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]
    folder, _, last = name.rpartition("/")
    scheme = text.partition("://")[0]
    try:
        cache = cache_folder()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}; let XDG_CACHE_HOME name a folder for copies") from error
    place = cache / scheme / folder / f"@{key if found else 'nothing'}" / last
    if found and not place.exists():
        try:
            with _alone(place):
                if not place.exists():  # another process of this machine may have made it meanwhile
                    _copy(text, name, found, place, objects)
        except OSError as error:
            reason = error.strerror or error
            remedy = "let XDG_CACHE_HOME name a folder that can be written"
            raise UserError(f"{text}: cannot be copied to {place} ({reason}); {remedy}") from error
    return place


def _found(objects: Any, name: str) -> list[Found]:
    """Return the object of this name, or all below it as a folder."""
    if not name.partition("/")[2]:
        raise OSError("it is a whole bucket; name a folder in it")
    below = [f for f in objects.found(f"{name}/") if not f.name.endswith("/")]
    if below:
        for one in below:
            parts = one.name[len(name) + 1 :].split("/")
            if not all(parts) or {".", ".."} & set(parts):
                raise OSError(f"{one.name} cannot be a file's name")
        return below
    return [f for f in objects.found(name) if f.name == name]


@contextlib.contextmanager
def _alone(place: Path):
    """Let one process of this machine copy to a place, and the others wait."""
    import portalocker

    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / ".lock").open("a") as file:
        with contextlib.suppress(portalocker.LockException):  # where there are no locks
            portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE)
        yield


def _copy(text: str, name: str, found: list[Found], place: Path, objects: Any) -> None:
    from tqdm import tqdm  # which no help and no mistake in a flag needs

    part = place.with_name(f"{place.name}.part")
    wanted = [(f, part / f.name[len(name) + 1 :] if f.name != name else part) for f in found]
    # What a copy that was broken off has brought is not brought again.
    missing = [(f, to) for f, to in wanted if not to.is_file() or to.stat().st_size != f.size]
    total = sum(f.size for f, _ in missing)
    free = shutil.disk_usage(place.parent).free
    if total + SPARE > free:
        raise UserError(
            f"{text}: {total / 1e9:.1f} GB are to be copied to {place.parent}, where "
            f"{free / 1e9:.1f} GB are free; let XDG_CACHE_HOME name a larger disk, or mount the "
            "bucket (gcsfuse) and give its path"
        )
    with (
        concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool,
        tqdm(
            total=total,
            desc=f"copying {text}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None if total > 1 << 20 else True,
        ) as bar,
    ):
        jobs = {pool.submit(objects.download, f.name, to, f.generation): f for f, to in missing}
        try:
            for done in concurrent.futures.as_completed(jobs):
                done.result()
                bar.update(jobs[done].size)
        except BaseException as error:  # Ctrl-C too must not wait for all the rest
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, OSError):
                raise
            raise UserError(f"{text}: cannot be copied ({error.strerror or error})") from error
    part.rename(place)
