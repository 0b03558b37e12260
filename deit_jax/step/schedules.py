"""Numbers of `config.distill` that change over a run, as functions of the step."""

import math
import re
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

SCHEDULED = ("alpha", "tau", "label_weight", "teacher_weight", "feature_weight")
SHAPES: dict[str, Callable] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - jnp.cos(jnp.pi * progress)),
}


class Change(NamedTuple):
    """A field of `config.distill` that goes from its own value to `end` over the run."""

    name: str
    shape: str
    end: float


def parse_schedule(text: str) -> tuple[Change, ...]:
    """Return the changes of `alpha=linear:0.1,tau=cosine:1`; raise ValueError for other texts."""
    changes = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\w+)=(\w+):(\S+)", item)
        if not match:
            raise ValueError(f"{item!r} is not NAME=SHAPE:END, as in alpha=linear:0.1")
        name, shape, end = match.groups()
        if name not in SCHEDULED:
            raise ValueError(f"{name}: choose among {', '.join(SCHEDULED)}")
        if shape not in SHAPES:
            raise ValueError(f"{name}={shape}: choose one of {', '.join(SHAPES)}")
        try:
            number = float(end)
        except ValueError:
            raise ValueError(f"{name}: {end!r} is no number") from None
        if not math.isfinite(number):
            raise ValueError(f"{name}: {end!r} is no finite number")
        if name in (change.name for change in changes):
            raise ValueError(f"{name} stands there twice")
        changes.append(Change(name, shape, number))
    return tuple(changes)


def at_step(distill, changes: tuple[Change, ...], step, total_steps: int) -> Any:
    """Return `config.distill` as it is at a step: itself where nothing changes.

    At step 0 a field has its own value, at `total_steps` its end.
    """
    if not changes:
        return distill
    progress = jnp.minimum(jnp.asarray(step, jnp.float32) / max(1, total_steps), 1.0)
    values = dict(distill.items())
    for name, shape, end in changes:
        values[name] = values[name] + (end - values[name]) * SHAPES[shape](progress)
    return types.SimpleNamespace(**values)
