"""What follows a run besides its own files: TRACKERS, by their names in train.trackers."""

from collections.abc import Iterable
from typing import NamedTuple


class Entry(NamedTuple):
    """One tracker: its module, which has a class Tracker (base.py), and the packages it needs.

    `beside` is for what may wait for a disk or a network: it gets a thread of its own.
    """

    module: str
    packages: tuple[str, ...] = ()
    beside: bool = True


TRACKERS = {
    "tensorboard": Entry("deit_jax.workdir.trackers.tensorboard", beside=False),
    "wandb": Entry("deit_jax.workdir.trackers.wandb", ("wandb",)),
    "mlflow": Entry("deit_jax.workdir.trackers.mlflow", ("mlflow", "sqlalchemy", "alembic")),
    "trackio": Entry("deit_jax.workdir.trackers.trackio", ("trackio",)),
}


def named(field: Iterable[str]) -> tuple[str, ...]:
    """Return the trackers that config.train.trackers names; one of its words may hold commas.

    >>> named(("tensorboard,wandb",))
    ('tensorboard', 'wandb')
    """
    words = (word.strip() for text in field for word in str(text).split(","))
    return tuple(dict.fromkeys(filter(None, words)))
