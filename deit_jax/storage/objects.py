"""What the objects of any kind of bucket have in common, whoever's client asks for them."""

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from deit_jax.errors import UserError

ENOPKG = getattr(errno, "ENOPKG", errno.ENOSYS)  # Linux alone has the first
CONNECT = 10.0  # seconds in which a server must take a connection
VARIABLE = "DEIT_GCS_TIMEOUT"


class Conflict(OSError):
    """An object that is not of the generation that was asked for: another process changed it."""


class Found(NamedTuple):
    """An object of a list: `bucket/a/b`, its size in bytes, and which of its contents it is."""

    name: str
    size: int
    generation: int | str


def name_of(path: Any) -> str:
    """Return `bucket/a/b` of gs://bucket/a/b or s3://bucket/a/b."""
    return str(path).partition("://")[2].rstrip("/")


@functools.cache
def silence() -> float:
    """Return after how many seconds without a byte a request is tried again."""
    text = os.environ.get(VARIABLE) or "30"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{VARIABLE}={text}: give seconds above 0, or unset it")
    return seconds


@contextlib.contextmanager
def explained(
    place: str, packages: tuple[str, ...], told: Callable[[Exception], tuple[int, str] | None]
) -> Iterator[None]:
    """Make an OSError, which names the place, of what a client of some packages raises.

    `told` returns errno and text of an error, None for an object of another generation.
    """
    try:
        yield
    except OSError as error:
        if error.filename or error.errno == ENOPKG:
            raise
        raise OSError(errno.EIO, one_line(error), place) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in packages:
            raise
        said = told(error)
        if said is None:
            raise Conflict(errno.ESTALE, "another process has changed it", place) from None
        raise OSError(*said, place) from error


def one_line(error: Exception) -> str:
    """Return what an error says in a line that is not too long."""
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
