"""Steps that go wrong change nothing; too many of them stop the run or take it back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from deit_jax.data.batches import TrainBatches
from deit_jax.errors import Interrupted, UserError
from deit_jax.models import preprocess
from deit_jax.parallel import sharding
from deit_jax.parallel.signals import StopRequest
from deit_jax.step import train_step
from deit_jax.step.state import TrainState
from deit_jax.storage import read_lines
from deit_jax.train import experiment, loop, run, step_dump
from deit_jax.train.run import train
from deit_jax.workdir.saved_run import load_run
from tests.tiny import make_tiny_config


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Keep compiled programs during these tests: of one device each, they may be read back."""
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    yield
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def config(monkeypatch):
    """Return a student that compiles in a moment, for one device, saved at every step."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda n, **_: make_mesh(n, jax.devices()[:1]))
    monkeypatch.setattr(run, "_draw", lambda trainer, results: None)
    c = make_tiny_config()
    c.distill.kind, c.model.depth, c.model.name = "none", 1, "deit_tiny_patch16_224"
    c.augment.auto, c.augment.erase_prob, c.mixing.prob = "", 0.0, 0.0
    c.train.eval_batch_size = 1624
    c.train.save_every_epochs, c.train.keep_checkpoints = 0.2, 2
    return c


class StopAfter(StopRequest):
    """Ask the run to stop after so many steps or batches of evaluation."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    def agreed(self, mesh):
        self._left -= 1
        return self._left <= 0


def poison(monkeypatch, bad):
    """Let train_step meet a batch whose images are not numbers where `bad(number, seed)`."""
    true_fill, true_normalise = TrainBatches.fill, preprocess.normalise

    def fill(self, number, block, batch):
        true_fill(self, number, block, batch)
        if bad(number, self._order.seed):
            batch["image"][:] = 255

    def normalise(images, mean, std):
        spoiled = jnp.where(jnp.all(images == 255), jnp.nan, 1.0)
        return true_normalise(images, mean, std) * spoiled

    monkeypatch.setattr(TrainBatches, "fill", fill)
    monkeypatch.setattr(train_step, "normalise", normalise)


def test_a_bad_step_keeps_all_but_the_clock():
    params = {"w": jnp.ones(3)}
    tx = optax.adamw(lambda count: 0.1 / (1 + count))
    stats = {"m": jnp.ones(2)}
    ema = {"params": params, "batch_stats": stats}
    state = TrainState(jnp.int32(7), params, stats, tx.init(params), ema)
    update = jax.jit(
        lambda s, g, loss: train_step.update(s, g, {"loss": loss}, {"m": jnp.zeros(2)}, tx, 0.5)
    )
    good, said = update(state, {"w": jnp.ones(3)}, jnp.float32(2.0))
    assert (said["skipped"], said["loss_spike"]) == (0, 1.0)
    assert not np.array_equal(good.params["w"], params["w"])
    for grad, loss in ((np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, np.inf)):
        bad, said = update(good, {"w": jnp.array([1.0, grad, 1.0])}, jnp.float32(loss))
        for name in ("params", "batch_stats", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(bad, name), getattr(good, name))
        adam, *_, clock = bad.opt_state
        jax.tree.map(np.testing.assert_array_equal, adam, good.opt_state[0])
        assert int(clock.count) == 2  # the learning rate is that of the step
        assert (int(bad.step), said["skipped"], said["skipped_in_row"]) == (9, 1, 1)
    again, said = update(bad, {"w": jnp.ones(3)}, jnp.float32(4.0))
    assert (said["skipped"], said["skipped_in_row"]) == (1, 0)
    assert said["loss_spike"] == pytest.approx(2.0)  # twice the running mean
    assert int(again.step) == 10


def test_two_bad_batches_are_skipped_and_counted(config, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, lambda number, seed: number in (3, 4))
    train(config, tmp_path / "run")
    records = [r for r in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["skipped"] for r in records] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert records[3]["loss"] is None
    assert "step 4: the loss is nan; the step changes nothing" in caplog.text
    assert np.isfinite(jax.tree.leaves(load_run(tmp_path / "run").variables)[0]).all()
    entropies = [r for r in read_lines(tmp_path / "run/metrics.jsonl") if "eval/cls.top1" in r]
    for record in entropies:
        lowest = record["attention_entropy/lowest_head"]
        assert 0 < lowest <= record["attention_entropy/mean"] <= np.log(17)


@pytest.mark.slow
def test_too_many_stop_the_run_and_the_first_can_be_replayed(config, tmp_path, monkeypatch):
    poison(monkeypatch, lambda number, seed: number >= 6)
    config.train.max_bad_steps = 2
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"loss is nan at step 9.*since step 6.*replay-step=7"):
        train(config, workdir)
    assert load_run(workdir).step == 6  # none was saved of the bad steps
    files = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    prepared, dataset = experiment.prepare(config, workdir)
    trainer = loop.Trainer(prepared, workdir, dataset, read_only=True)
    directory = step_dump.dump(trainer, 7)
    norms = json.loads((directory / "norms.json").read_text())
    assert norms["terms"]["loss"] == "nan"
    assert norms["parameters"]["blocks_0/attn/qkv/kernel"]["not_finite"] == 0
    assert norms["gradients"]["blocks_0/attn/qkv/kernel"]["not_finite"] > 0
    assert norms["activations"]["patch_embed"]["not_finite"] > 0
    batch = np.load(directory / "batch.npz")
    assert (batch["image"] == 255).all()
    assert np.isnan(batch["model_input"]).all()
    assert files == {p: p.stat().st_mtime_ns for p in files}


@pytest.mark.slow
def test_a_replayed_step_is_the_step(config, tmp_path):
    """A step between checkpoints, and one before the first: the loss that the run recorded."""
    config.train.save_every_epochs, config.epochs = 0.8, 1.0
    workdir = tmp_path / "run"
    train(config, workdir)
    records = {r["step"]: r for r in read_lines(workdir / "metrics.jsonl") if "loss" in r}
    prepared, dataset = experiment.prepare(config, workdir)
    for number in (5, 2):
        trainer = loop.Trainer(prepared, workdir, dataset, read_only=True)
        norms = json.loads((step_dump.dump(trainer, number) / "norms.json").read_text())
        assert norms["terms"]["loss"] == pytest.approx(records[number]["loss"], rel=1e-5)
        squares = [layer["norm"] ** 2 for layer in norms["gradients"].values()]
        assert sum(squares) ** 0.5 == pytest.approx(records[number]["grad_norm"], rel=1e-4)
    with pytest.raises(UserError, match="--replay-step=6: the run has 5 steps"):
        step_dump.dump(trainer, 6)


@pytest.mark.slow
def test_rolling_back_takes_other_data_and_resumes_to_the_same_bits(config, tmp_path, monkeypatch):
    """Data of the first seed is bad from step 7 on. Stopping on the way changes nothing."""
    poison(monkeypatch, lambda number, seed: number >= 6 and seed == 0)
    config.train.max_bad_steps, config.train.on_divergence = 1, "rollback"
    config.train.save_every_epochs = 0.8  # steps 4 and 8
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config, whole)
    history = read_lines(whole / "history.jsonl")
    rollback = next(r for r in history if r["event"] == "rollback")
    assert (rollback["to"], rollback["first"], rollback["step"]) == (4, 7, 8)
    stops = 0
    while True:
        try:
            train(config, stopped, StopAfter(3))
            break
        except Interrupted:
            stops += 1
    assert stops > 4  # after steps, while evaluating, on the way to going back, and after it
    assert (whole / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()
    a, b = (load_run(d) for d in (whole, stopped))
    jax.tree.map(np.testing.assert_array_equal, (a.variables, a.ema), (b.variables, b.ema))
    records = [r for r in read_lines(whole / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 11))
    assert records[-1]["skipped"] == 0


def test_rolling_back_has_an_end(config, tmp_path, monkeypatch):
    poison(monkeypatch, lambda number, seed: number >= 2)
    config.train.max_bad_steps, config.train.on_divergence = 0, "rollback"
    config.train.max_rollbacks = 1
    with pytest.raises(UserError, match=r"loss is nan at step 3"):
        train(config, tmp_path / "run")
    history = read_lines(tmp_path / "run/history.jsonl")
    assert [r["event"] for r in history] == ["start", "rollback"]
