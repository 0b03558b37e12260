"""Early stopping and longer training: from recorded evaluations alone, to the same bits."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest

from deit_jax.errors import UserError
from deit_jax.storage import read_lines
from deit_jax.train import run as run_lib
from deit_jax.train.patience import Patience
from deit_jax.train.run import train
from deit_jax.workdir.saved_run import load_run
from tests.tiny import make_tiny_config

pytestmark = pytest.mark.eight_devices


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(run_lib, "_draw", lambda trainer, results: None)


def config(**changes):
    """Return a run of ten steps, evaluated after every one, that learns next to nothing."""
    c = make_tiny_config()
    c.distill.kind, c.optim.ema_decay = "none", 0.0
    c.optim.lr, c.optim.min_lr, c.optim.warmup_epochs = 2e-5, 1e-5, 0.0
    c.train.eval_every_epochs, c.train.save_every_epochs = 0.2, 0.4
    c.train.keep_checkpoints = 10
    c.update_from_flattened_dict(changes)
    return c


def scores(workdir):
    records = read_lines(workdir / "metrics.jsonl")
    return {r["step"]: r["eval/fused.top1"] for r in records if "eval/fused.top1" in r}


def expected_stop(known, patience):
    """Return the first evaluation that is so many steps after the first of the best before it."""
    steps, values = np.array(list(known)), np.array(list(known.values()))
    for i in range(len(steps)):
        if steps[i] - steps[np.argmax(values[: i + 1])] >= patience:
            return int(steps[i])
    return int(steps[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train to the end, without patience."""
    workdir = tmp_path_factory.mktemp("patience") / "whole"
    return workdir, train(config(), workdir)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("patience") / "stopped"
    return workdir, train(config(**{"train.patience_epochs": 0.6}), workdir)


@pytest.mark.slow
def test_a_run_stops_where_its_evaluations_say(whole, stopped):
    workdir, results = stopped
    stop, known = expected_stop(scores(whole[0]), 3), scores(workdir)
    assert 3 < stop < 10
    assert results["step"] == max(known) == load_run(workdir).step == stop
    assert known == {s: v for s, v in scores(whole[0]).items() if s <= stop}
    best = max(known, key=lambda s: (known[s], -s))
    assert results["stopped_early"] == {
        "patience_epochs": 0.6,
        "best_step": best,
        "best": known[best],
        "figure": "top1",
        "total_steps": 10,
    }
    assert json.loads((workdir / "results.json").read_text()) == results
    assert "stopped_early" not in whole[1]


@pytest.mark.slow
def test_a_stopped_run_does_not_train_on(stopped, tmp_path):
    c, (workdir, results) = config(**{"train.patience_epochs": 0.6}), stopped
    copy = shutil.copytree(workdir, tmp_path / "copy")
    metrics = (copy / "metrics.jsonl").read_bytes()
    assert train(c, copy) == results
    (copy / "results.json").unlink()  # killed between the last state and the results
    assert train(c, copy) == results
    assert (copy / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4])
def test_a_run_that_was_killed_stops_at_the_same_step(stopped, tmp_path, at):
    workdir, results = stopped
    copy = shutil.copytree(workdir, tmp_path / "copy")
    (copy / "results.json").unlink()
    for place in (copy / "checkpoints").iterdir():
        if place.name.isdecimal() and int(place.name) > at:
            shutil.rmtree(place)
    assert train(config(**{"train.patience_epochs": 0.6}), copy) == results
    assert (copy / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    same = jax.tree.map(np.array_equal, *(load_run(w).variables for w in (copy, workdir)))
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_without_patience_it_goes_on_to_the_end(whole, stopped, tmp_path):
    copy = shutil.copytree(stopped[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"train.patience_epochs: 0.6 -> 0.0"):
        train(config(), copy)
    results = train(config(), copy, allowed=["train.patience_epochs"])
    assert results == whole[1]
    same = jax.tree.map(np.array_equal, *(load_run(w).variables for w in (copy, whole[0])))
    assert all(jax.tree.leaves(same))


def test_patience_counts_from_the_first_of_equals():
    patience = Patience(3, {})
    for step, score, stops in [(1, 5.0, 0), (2, 5.0, 0), (3, 4.0, 0), (4, 5.0, 1), (5, 6.0, 0)]:
        patience.evaluated(step, score)
        assert patience.exhausted(step) == bool(stops)
    assert patience.facts == {"best_step": 5, "best": 6.0}
    assert not Patience(0, {"best_step": 1, "best": 1.0}).exhausted(10**6)
    assert not Patience(1, {}).exhausted(10**6)


@pytest.mark.slow
def test_more_epochs_after_the_end(whole, tmp_path, caplog):
    copy = shutil.copytree(whole[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"epochs: 2.0 -> 3.0.*--allow-config-change=epochs"):
        train(config(epochs=3.0), copy)
    with caplog.at_level(logging.INFO, "deit_jax"):
        results = train(config(epochs=3.0), copy, allowed=["epochs"])
    assert results["step"] == 15
    # The cosine of 15 steps at step 10, and that of 10 steps at its end.
    ahead = 1e-5 + 1e-5 * (1 + np.cos(np.pi * 10 / 15)) / 2
    assert f"goes on at {ahead:.3g}, where it would have been 1e-05" in caplog.text
    rates = {r["step"]: r["lr"] for r in read_lines(copy / "metrics.jsonl") if "lr" in r}
    assert rates[11] == pytest.approx(ahead, rel=1e-5)
    assert rates[10] == pytest.approx(1e-5 + 1e-5 * (1 + np.cos(np.pi * 9 / 10)) / 2, rel=1e-5)
    assert train(config(epochs=3.0), copy) == results
    with pytest.raises(UserError, match=r"config.epochs=1: these are 5 steps, .* taken 15; give"):
        train(config(epochs=1.0), copy, allowed=["epochs"])
