"""The folder that keeps compiled programs from one start of a training to the next."""

import logging
import tempfile
from pathlib import Path

import jax

from deit_jax.storage.fetch import cache_folder

log = logging.getLogger("deit_jax")


def enable() -> None:
    """Keep compiled programs in ~/.cache/deit_jax/xla, unless JAX was told where, or not to.

    JAX_COMPILATION_CACHE_DIR names another place, JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    A place that cannot be written is no error: compiling takes its time again. To be called once
    the processes of a run have found each other, for it asks for their devices.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    # With jaxlib 0.12 a program for several CPU devices that is read back starts its collectives in
    # another order on each of them, and they wait for each other for ever.
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if chosen and "://" in chosen:
        return  # a bucket, which JAX reads and writes itself
    place: str | Path = chosen or "~/.cache"
    try:
        place = folder = Path(chosen) if chosen else default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        jax.config.update("jax_enable_compilation_cache", False)
        reason = getattr(error, "strerror", None) or error
        log.warning("%s: compiled programs are not kept (%s)", place, reason)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def default_folder() -> Path:
    """Return where programs are kept if nobody says otherwise; RuntimeError without a home."""
    return cache_folder() / "xla"
