"""Early stopping: when a run has not become better for long enough."""

from collections.abc import Mapping
from typing import Any


class Patience:
    """The best evaluation so far, and whether `steps` have passed since it; 0 = for ever.

    It is saved beside every state and taken from there, so that a run that goes on decides as one
    that never stopped.
    """

    def __init__(self, steps: int, facts: Mapping[str, Any]):
        self._steps = steps
        self.best_step: int | None = facts.get("best_step")
        self.best: float | None = facts.get("best")

    @property
    def facts(self) -> dict[str, Any]:
        """What to save beside a state."""
        return {"best_step": self.best_step, "best": self.best}

    def evaluated(self, step: int, score: float) -> None:
        """Take a figure; an equal one is no better."""
        if self.best is None or score > self.best:
            self.best_step, self.best = step, score

    def exhausted(self, step: int) -> bool:
        """Return whether a run that has come to `step` should stop."""
        return (
            bool(self._steps)
            and self.best_step is not None
            and (step - self.best_step >= self._steps)
        )
