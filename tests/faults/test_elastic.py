"""A checkpoint of one set of devices goes on on another, and so does the loss."""

import jax
import pytest

from deit_jax.errors import Interrupted
from deit_jax.parallel import sharding
from deit_jax.storage import read_lines
from deit_jax.train import experiment, loop, run
from deit_jax.train.run import train
from tests.faults.test_divergence import StopAfter
from tests.tiny import make_tiny_config


def losses(workdir):
    return [r["loss"] for r in read_lines(workdir / "metrics.jsonl") if "loss" in r]


@pytest.mark.slow
def test_devices_may_change_at_every_start(tmp_path, monkeypatch):
    """Eight devices, four to a copy of the weights; then two; against one all along."""
    make_mesh, devices = sharding.make_mesh, jax.devices()
    config = make_tiny_config()
    config.distill.kind, config.model.depth, config.model.name = "none", 1, "deit_tiny_patch16_224"
    config.augment.auto, config.augment.erase_prob, config.mixing.prob = "", 0.0, 0.0
    config.model.width = 96  # large enough for weights to be shared out
    config.optim.eps = 1e-4  # Adam's first steps are signs: tame rounding around 0
    monkeypatch.setattr(run, "_draw", lambda trainer, results: None)
    monkeypatch.setattr(sharding, "make_mesh", lambda n, **_: make_mesh(n, devices[:1]))
    train(config, tmp_path / "whole")
    shared = set()
    for count, fsdp, steps in ((8, 4, 4), (2, 1, 99)):
        config.mesh.fsdp = fsdp
        monkeypatch.setattr(
            sharding, "make_mesh", lambda n, count=count, **_: make_mesh(n, devices[:count])
        )
        stop = StopAfter(steps)
        try:
            train(config, tmp_path / "moved", stop)
        except Interrupted:
            pass
        else:
            assert count == 2
        prepared, dataset = experiment.prepare(config, tmp_path / "moved")
        trainer = loop.Trainer(prepared, tmp_path / "moved", dataset, read_only=True)
        kernel = trainer.state.params["blocks_0"]["mlp"]["fc1"]["kernel"]
        shared.add(kernel.addressable_shards[0].data.size / kernel.size)
    assert shared == {0.25, 1.0}
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
