"""Nothing is compiled twice: not in a step after the first, nor in a later evaluation or save."""

import contextlib
from pathlib import Path

import jax
import pytest

from deit_jax.data.sources.registry import open_dataset
from deit_jax.train import loop
from tests.tiny import resolved

EVENT = "/jax/core/compile/backend_compile_duration"
STEPS, EVALUATE, SAVE = 12, 3, 4  # in all, and every so many; an epoch has five


@contextlib.contextmanager
def compilations():
    """Collect for every program that is compiled what `now[0]` is at the time."""
    found, now = [], [None]

    def listen(event, seconds, **_):
        if event == EVENT:
            found.append(now[0])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found, now
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def compiled_in(config, workdir: Path, total=STEPS, change=lambda x: x) -> set[tuple[str, int]]:
    """Train with saves and evaluations; return ("in" | "after", step) where something compiled.

    `change` is what becomes of the state from one step to the next.
    """
    config.epochs, config.model.depth = total / 5, 1
    config.train.eval_every_epochs, config.train.save_every_epochs = EVALUATE / 5, SAVE / 5
    dataset = open_dataset(config.data)
    experiment = resolved(config, dataset)
    trainer = loop.Trainer(experiment, workdir, dataset, experiment.random_teacher())
    step, numbers = trainer.step, iter(range(1, total + 1))
    with compilations() as (found, now):

        def watched(state, *rest):
            number = next(numbers)
            now[0] = ("in", number)
            state, values = step(state, *rest)
            now[0] = ("after", number)
            return change(state), values

        trainer.step = watched
        trainer.run()
    assert next(numbers, None) is None
    return set(found) - {None}


@pytest.mark.slow
def test_only_the_first_step_log_evaluation_and_save_compile(tiny_config, tmp_path):
    found = compiled_in(tiny_config, tmp_path)
    assert ("in", 1) in found  # or nobody listens
    # The first step's line is written while the second one runs.
    assert found <= {("in", 1), ("after", 1), ("after", 2), ("after", EVALUATE), ("after", SAVE)}


@pytest.mark.slow
def test_a_python_number_in_the_state_would_be_noticed(tiny_config, tmp_path):
    """Its type is weak: that is another program than the first step's."""
    tiny_config.distill.kind, tiny_config.optim.ema_decay = "none", 0.0
    tiny_config.mixing.prob = tiny_config.augment.erase_prob = 0.0

    def wrong(state):
        return state.replace(step=int(state.step))

    found = compiled_in(tiny_config, tmp_path, 3, wrong)
    assert {("in", 1), ("in", 2)} <= found
