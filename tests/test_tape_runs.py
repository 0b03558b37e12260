"""Label tapes through whole runs: one that rolls back, and soft distillation."""

import jax
import numpy as np
import pytest

from deit_jax.parallel import sharding
from deit_jax.storage import read_lines
from deit_jax.train import run
from deit_jax.train.run import train
from deit_jax.train.tape import tape
from deit_jax.train.teacher_spec import teacher_config
from deit_jax.workdir.saved_run import load_run
from tests.faults.test_divergence import compile_once, poison  # noqa: F401
from tests.test_tape import STEPS, array, assert_same_bits, full_config, replaying


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return a recording config with a trained teacher, for one device, saved twice."""
    c, make_mesh = full_config(), sharding.make_mesh
    c.train.save_every_epochs = 0.8  # steps 4 and 8
    c.teacher.tape, c.model.depth, c.optim.accum_steps = "record", 1, 1
    c.augment.auto, c.augment.erase_prob, c.mixing.prob = "", 0.0, 0.0  # compiles in less
    c.train.eval_batch_size = 1624
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda n, **_: make_mesh(n, jax.devices()[:1]))
        patch.setattr(run, "_draw", lambda trainer, results: None)
        root = tmp_path_factory.mktemp("teacher")
        train(teacher_config(c), root)
        c.teacher.weights = str(root)
        yield c


@pytest.mark.slow
def test_a_run_that_went_back_is_recorded_and_replayed_as_it_went_on(config, tmp_path, monkeypatch):
    """Data of the first seed is bad from step 7 on; a replay then goes back just so."""
    poison(monkeypatch, lambda number, seed: number >= 6 and seed == 0)
    config = config.copy_and_resolve_references()
    config.train.max_bad_steps, config.train.on_divergence = 1, "rollback"
    train(config, tmp_path / "recorded")
    path = tmp_path / "recorded" / "tape"
    assert array(path, "recorded")[:, 0].tolist() == [0] * 4 + [1] * 6
    # Up to where it goes back the teacher answers: the tape has other views of those steps.
    replay = replaying(config, path, config.teacher.weights)
    train(replay, tmp_path / "replayed")
    assert_same_bits(tmp_path / "recorded", tmp_path / "replayed")
    for name in ("recorded", "replayed"):
        history = read_lines(tmp_path / name / "history.jsonl")
        assert [(r["to"], r["step"]) for r in history if r["event"] == "rollback"] == [(4, 8)]


@pytest.mark.slow
def test_soft_distillation_from_all_classes_ends_close_to_the_live_one(config, tmp_path):
    """Not at the same bits: the tape rounds to half precision, 11 bits of a log-probability."""
    config = config.copy_and_resolve_references()
    config.distill.kind, config.distill.tau, config.optim.eps = "soft", 3.0, 1e-4
    assert config.teacher.tape_top_k >= 10
    train(config, tmp_path / "live")
    assert tape.Tape.open(tmp_path / "live" / "tape").layout.top_k == 10
    train(replaying(config, tmp_path / "live" / "tape"), tmp_path / "replayed")
    losses = [
        [r["loss"] for r in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("live", "replayed")
    ]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(*losses, rtol=1e-3)
    live, replayed = (
        load_run(tmp_path / name).variables["params"] for name in ("live", "replayed")
    )
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), live, replayed)
    assert 0 < max(jax.tree.leaves(apart)) < 1e-4  # of steps of 1e-3 and less, ten of them
