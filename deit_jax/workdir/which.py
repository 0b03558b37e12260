"""Words for which checkpoint of a run is meant; without JAX, as every command knows them."""

from pathlib import PurePath

from deit_jax.errors import UserError
from deit_jax.storage import steps_in, to_path

LATEST, BEST = "latest", "best"


def parse_checkpoint(text: str | int) -> str | int:
    """Return which checkpoint is meant: latest, best or a step; raise UserError for another word.

    >>> parse_checkpoint("500")
    500
    """
    if text in (LATEST, BEST):
        return text
    if not str(text).isdecimal():
        raise UserError(f"checkpoint={text}: give {LATEST}, {BEST} or a step, as 500")
    return int(text)


def kept_steps(workdir: str | PurePath) -> list[int]:
    """Return the steps of a run whose checkpoints are there, the first one first."""
    return steps_in(to_path(workdir) / "checkpoints")
