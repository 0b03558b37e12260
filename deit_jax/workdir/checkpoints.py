"""Checkpoints of the whole train state, by Orbax: saved in the background, checked, restored.

WORKDIR/checkpoints/N   the state after N steps; sha256.json in it holds checksums of its files
"""

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from deit_jax.errors import UserError
from deit_jax.step.state import new_health
from deit_jax.storage import absolute, backend, exists, is_remote, steps_in
from deit_jax.workdir import checksums

log = logging.getLogger("deit_jax")

TRIES = 3  # of a save that must be there and failed, in a bucket
# Orbax warns of a directory that we open to read that it is only to be read.
logging.getLogger("absl").addFilter(lambda record: "is read only" not in str(record.msg))


def best_of(facts: Mapping[int, dict[str, Any]], figure: str) -> int | None:
    """Return the step whose `figure` is the highest, the newest of equals; None without any.

    `facts` are those saved beside the states, by their steps. The figure is the fused prediction's
    of the weights themselves, not of their average.
    """
    ranked = [s for s, known in facts.items() if known.get(figure) is not None]
    return max(ranked, key=lambda s: (facts[s][figure], s), default=None)


@dataclasses.dataclass
class KeepPolicy:
    """Keep the latest planned checkpoints, the best one and the newest, planned or not.

    `best` is the figure that ranks them.
    """

    keep: int
    best: str = "top1"

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Return for each checkpoint, oldest first, whether it stays."""
        facts = {c.step: c.metrics or {} for c in checkpoints}
        steps = [c.step for c in checkpoints]
        # A checkpoint made because the run was told to stop must not push out a planned one, or
        # what a run finds to roll back to would depend on when it was stopped.
        kept = {s for s in steps if not facts[s].get("interim")}
        kept = set(sorted(kept)[-self.keep :]) | set(steps[-1:])
        if (best := best_of(facts, self.best)) is not None:
            kept.add(best)
        return [s in kept for s in steps]


class Checkpointer:
    """Save states in the background, keeping the latest few and the best one.

    A save that fails, as on a full disk, is told of and left out: the next one tries again. A
    directory that is gone or read-only raises UserError.
    """

    def __init__(self, workdir: PurePath, keep: int, read_only: bool = False, best: str = "top1"):
        self._saving: int | None = None
        self._last: tuple[int, Any, dict[str, Any]] = (-1, None, {})
        self._best = best
        self._read_only = read_only
        self._notify = lambda event, **facts: None
        self._flush = lambda: None
        options = {"read_only": True, "create": False} if read_only else {}
        if not read_only:
            options["cleanup_tmp_directories"] = True
            options["async_options"] = ocp.AsyncOptions(
                post_finalization_callback=self._write_checksums,
                # In the background, a directory that cannot be made is waited for in vain; in a
                # bucket none is made, and each request would hold up the step.
                create_directories_asynchronously=is_remote(workdir),
            )
        self._directory = absolute(workdir / "checkpoints")
        try:
            if not read_only:
                _mark_copied(self._directory)
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=KeepPolicy(keep, best),
                    best_fn=lambda facts: facts[best],  # without one, no facts are saved
                    **options,
                ),
            )
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error

    def notify_with(self, notify) -> None:
        """Call `notify(event, **facts)` for what befalls the checkpoints."""
        self._notify = notify

    def flush_with(self, flush) -> None:
        """Call `flush()` before a checkpoint is whole: what it goes on from is safe before it."""
        self._flush = flush

    @property
    def latest_step(self) -> int | None:
        """The newest step saved, None without any."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state,
        score: float | None,
        interim: bool = False,
        eval_pending: bool = False,
        known: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Start saving; `score` (percent) ranks the checkpoint if it was just evaluated.

        `interim` marks a checkpoint outside the plan, `eval_pending` one whose evaluation is due;
        what is `known` besides is in its facts too.
        """
        self.settle()
        facts = {self._best: score, "interim": interim, "eval_pending": eval_pending, **known}
        self._last = step, state, facts
        self._start_saving()

    def _start_saving(self) -> None:
        step, state, facts = self._last
        self._saving = step
        try:
            backend(self._directory).must_be_writable(self._directory)
            if step in self._manager.all_steps():  # an interim one
                self._manager.delete(step)
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=facts)
        except Exception as error:
            self._failed(error)

    def settle(self, wait: bool = True) -> None:
        """Tell of a save that failed; with `wait`, let the one under way end first."""
        if self._saving is None or (not wait and self._manager.is_saving_in_progress()):
            return
        try:
            self._manager.wait_until_finished()
            self._saving = None
        except Exception as error:
            self._failed(error)

    def require_saved(self, step: int) -> None:
        """Wait for saves; raise UserError if the state after `step` is not among them.

        In a bucket one that failed is tried again: a request that hangs fails the save.
        """
        self.settle()
        for _ in range(TRIES if is_remote(self._directory) and self._last[0] == step else 0):
            if self.latest_step == step:
                return
            self._start_saving()
            self.settle()
        if self.latest_step != step:
            remedy = "" if is_remote(self._directory) else "make room, and "
            raise UserError(
                f"{self._directory}: the state after step {step} could not be saved, the last good "
                f"checkpoint is {self.latest_step}; {remedy}run the same command again"
            )

    def _failed(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        text = next(iter(str(error).splitlines()), type(error).__name__)
        try:
            backend(self._directory).must_take_files(self._directory)
        except OSError:
            raise UserError(
                f"{self._directory}: the state after step {step} cannot be saved ({text}); make "
                "the directory writable again, and run the same command"
            ) from error
        self._manager.reload()  # Orbax has already forgotten the old ones, which are still there
        if jax.process_index() == 0:  # what was written of it takes room that is lacking
            self._remove_unfinished(step)
        log.warning(
            "step %s could not be saved (%s); training goes on, the last good checkpoint is %s",
            step,
            text,
            self.latest_step,
        )
        self._notify("save failed", step=step, error=text)

    def _remove_unfinished(self, step: int | None) -> None:
        """Remove what Orbax has begun; its other writers may still add to it for a moment."""
        for _ in range(20):
            if not (parts := self._unfinished(step)):
                return
            for part in parts:
                backend(part).remove(part)
            time.sleep(0.1)

    def _write_checksums(self) -> None:
        """Add checksums to the checkpoint that Orbax is about to put in its place."""
        if jax.process_index() == 0:
            self._flush()
            unfinished = self._unfinished(self._saving)
            checksums.write(unfinished[-1] if unfinished else self._directory / str(self._saving))

    def _unfinished(self, step: int | None) -> list[PurePath]:
        """Return the folders that Orbax has begun to write a step in, the newest last."""
        place = backend(self._directory)
        names = place.names(self._directory)
        found = [name for name in names if name.startswith(f"{step}.") and "tmp" in name]
        # In a bucket it is written where it is to be, and marked as whole at the end.
        here = self._directory / str(step)
        found += [here.name] if here.name in names and not place.is_complete(here) else []
        return [self._directory / name for name in found]

    def restore(self, abstract_state, at_most: int | None = None, planned: bool = False):
        """Return the newest good state, each array where `abstract_state` says.

        Damaged checkpoints newer than it are told of and renamed to `damaged-N`. `at_most` limits
        the step; `planned` leaves out interim checkpoints. Raise UserError, with nothing changed,
        if none is good or the state is another config's.
        """
        damaged: dict[int, str] = {}
        for step in self._candidates(at_most, planned):
            problem = _agreed_problem(self._directory / str(step))
            if problem is None:
                try:
                    state = self._restore(step, abstract_state)
                    self._set_aside(damaged)
                    return state
                except Exception as error:
                    if checksums.has(self._directory / str(step)):  # its files are as written
                        raise UserError(
                            f"{self._directory / str(step)}: does not fit this config "
                            f"({next(iter(str(error).splitlines()), type(error).__name__)}); "
                            "restore the config or choose a new --workdir"
                        ) from error
                    problem = f"{type(error).__name__} on reading it"
            damaged[step] = problem
        raise UserError(
            f"{self._directory}: no good checkpoint ("
            + ("; ".join(f"{s}: {p}" for s, p in damaged.items()) or "there is none")
            + "); nothing was changed: bring one back from a copy, or choose a new --workdir"
        )

    def has(self, at_most: int) -> bool:
        """Return whether there is a checkpoint of that step or an earlier one."""
        return bool(self._candidates(at_most, planned=False))

    def _candidates(self, at_most: int | None, planned: bool) -> list[int]:
        # In a bucket Orbax also lists, to who only reads, what a killed save has left.
        steps = sorted({*self._manager.all_steps()} & {*steps_in(self._directory)}, reverse=True)
        if at_most is not None:
            steps = [s for s in steps if s <= at_most]
        return [s for s in steps if not (planned and self.facts(s).get("interim"))]

    def facts(self, step: int) -> dict[str, Any]:
        """Return what was saved beside a state: its figure, interim, eval_pending."""
        return self._manager.metrics(step) or {}

    def _restore(self, step: int, abstract_state):
        saved = ocp.PyTreeCheckpointHandler().metadata(self._directory / str(step) / "default")
        old = saved.tree.get("health") is None and hasattr(abstract_state, "health")
        if old:  # it was saved by a version that had none
            health, abstract_state = abstract_state.health, abstract_state.replace(health=None)
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
        if old:
            new = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), new_health(), health)
            state = state.replace(health=new)
        return state

    def _set_aside(self, damaged: dict[int, str]) -> None:
        if self._read_only:
            return
        for step, problem in damaged.items():
            place = self._directory / f"damaged-{step}"
            number = 2
            while exists(place):
                place = self._directory / f"damaged-{step}-{number}"
                number += 1
            log.warning(
                "checkpoint %d is damaged (%s): kept as %s, going on from the one before",
                step,
                problem,
                place.name,
            )
            self._notify("damaged checkpoint", step=step, problem=problem)
            if jax.process_index() == 0:
                backend(place).rename(self._directory / str(step), place)
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints newer than `step`, whose states a rollback undid."""
        self.settle()
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(later)

    def close(self) -> None:
        """Wait for saves under way."""
        self.settle()
        self._manager.close()


def _mark_copied(directory: PurePath) -> None:
    """Mark checkpoints in a bucket that were copied there from a disk, where none has a mark.

    Orbax would take them for what a killed save has left, and delete them. Damaged ones are set
    aside.
    """
    if not is_remote(directory):
        return
    place = backend(directory)
    for step in steps_in(directory) if jax.process_index() == 0 else ():
        here = directory / str(step)
        if place.is_marked(here):
            continue
        if problem := checksums.problem(here):
            log.warning("checkpoint %d is damaged (%s): kept as damaged-%d", step, problem, step)
            backend(here).rename(here, directory / f"damaged-{step}")
            continue
        log.info("checkpoint %d has no mark of Orbax, but sound checksums: it is taken", step)
        place.mark(here)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoints marked")


def _agreed_problem(directory: PurePath) -> str | None:
    """Return what is wrong with a checkpoint's files; process 0 reads them for all."""
    problem = checksums.problem(directory) if jax.process_index() == 0 else None
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.bool_(problem)):
        problem = problem or "as process 0 found"
    return problem
