"""Whose a run's directory is, who works in it, what it records."""

import json
import os
import signal
import subprocess
import sys

import pytest

from configs import base
from deit_jax import config as config_lib
from deit_jax import metrics, train_command, workdir
from deit_jax import train as train_lib
from deit_jax.errors import UserError
from tests.conftest import make_tiny_config

HOLD = """
import sys, time
from pathlib import Path
from deit_jax import workdir
with workdir.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_takes_one_run_at_a_time_and_a_killed_one_leaves_it_free(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another run is in it \(process {process.pid} on "):
        workdir.held(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with workdir.held(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    with workdir.held(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*file/run: cannot be written \(Not a dir"):
        workdir.held(tmp_path / "file/run").__enter__()


def test_a_changed_field_needs_leave(tmp_path, tiny_config, caplog):
    workdir.claim(tmp_path, tiny_config, ["a", "b"])
    tiny_config.optim.lr, tiny_config.seed = 0.5, 3
    with pytest.raises(UserError, match=r"optim.lr: 0.001 -> 0.5; seed: 0 -> 3.*--allow-config-ch"):
        workdir.claim(tmp_path, tiny_config, ["a", "b"])
    with pytest.raises(UserError, match=r"\(seed: 0 -> 3\).*--allow-config-change=seed$"):
        workdir.claim(tmp_path, tiny_config, ["a", "b"], ["optim.lr"])
    with pytest.raises(UserError, match=r"--allow-config-change=sed: no such field"):
        workdir.claim(tmp_path, tiny_config, ["a", "b"], ["sed"])
    workdir.claim(tmp_path, tiny_config, ["a", "b"], ["optim.lr", "seed"])
    assert "optim.lr: 0.001 -> 0.5" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3
    assert metrics.read_lines(tmp_path / "history.jsonl")[0]["event"] == "config changed"
    workdir.claim(tmp_path, tiny_config, ["a", "b"], ["optim.lr"])  # the same command again


def test_a_field_that_the_run_is_too_old_to_have_is_no_change_at_its_default(tiny_config):
    old = config_lib.to_json(tiny_config)
    del old["train"]["max_bad_steps"], old["mesh"], old["data"]["skip_unreadable"]
    assert config_lib.differences(old, config_lib.to_json(tiny_config)) == []
    tiny_config.train.max_bad_steps = base.get_config().train.max_bad_steps + 1
    (change,) = config_lib.differences(old, config_lib.to_json(tiny_config))
    assert change == "train.max_bad_steps: 5 -> 6"
    old["optim"]["nesterov"] = True  # a field that there is no more is one
    assert "optim.nesterov: True -> (no such field)" in config_lib.differences(
        old, config_lib.to_json(tiny_config)
    )


def test_a_run_records_how_it_came_about_and_is_reproduced_from_that(tmp_path, monkeypatch, caplog):
    config = make_tiny_config()
    config.distill.kind, config.model.depth, config.model.name = "none", 1, "deit_tiny_patch16_224"
    config.epochs = 1.0
    train_lib.train(config, tmp_path / "run")
    (start,) = metrics.read_lines(tmp_path / "run/history.jsonl")
    assert start["command"] == sys.argv
    assert start["packages"]["jax"]
    assert start["devices"].startswith("8 ")
    train_command.main([f"--reproduce={tmp_path / 'run'}"])
    again = tmp_path / "run-reproduced"
    for name in ("metrics.jsonl", "results.json", "config.json"):
        assert (again / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert "then" not in caplog.text
    monkeypatch.setattr(workdir, "_version", lambda name: "0.0" if name == "optax" else "1")
    with caplog.at_level("WARNING", "deit_jax"):
        workdir.recorded_config(tmp_path / "run")
    assert "packages.optax: " in caplog.text
    with pytest.raises(UserError, match="no run is recorded there"):
        workdir.recorded_config(tmp_path)
