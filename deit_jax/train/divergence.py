"""Steps whose loss or gradient is not finite: told of, and counted until they are too many."""

import logging
import math

log = logging.getLogger("deit_jax")


class Diverged(Exception):
    """More steps in a row than allowed had a loss or a gradient that is not finite."""

    def __init__(self, step: int, first: int, message: str):
        super().__init__(message)
        self.step, self.first = step, first


def warn_or_raise(step: int, in_row: int, values: dict[str, float], most: int) -> None:
    """Warn of a step that changed nothing, the `in_row`th; raise Diverged beyond `most` of them."""
    key, what = ("loss", "the loss")
    if math.isfinite(values["loss"]):
        key, what = ("grad_norm", "the norm of the gradient")
    if in_row <= most:
        log.warning("step %d: %s is %s; the step changes nothing", step, what, values[key])
        return
    first = step - in_row + 1
    raise Diverged(
        step,
        first,
        f"{what} is {values[key]} at step {step}, and the weights have not changed since step "
        f"{first - 1}; look at step {first} with --replay-step={first}, lower config.optim.lr or "
        "clip with config.optim.clip_norm. The last checkpoint is kept",
    )
