"""Whose a run's directory is, who works in it, what it records."""

import json
import os
import signal
import subprocess
import sys

import pytest

from deit_jax.config.serialize import to_json
from deit_jax.configs import base
from deit_jax.errors import UserError
from deit_jax.storage import read_lines
from deit_jax.workdir import directory
from deit_jax.workdir.directory import changes

HOLD = """
import sys, time
from pathlib import Path
from deit_jax.workdir import directory
with directory.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_takes_one_run_at_a_time_and_a_killed_one_leaves_it_free(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another run is in it \(process {process.pid} on "):
        directory.locked(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with directory.locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == ""  # no run is under way
    with directory.locked(tmp_path):
        pass


def test_a_lock_that_names_nobody_is_told_of_as_such(tmp_path, monkeypatch):
    with directory.locked(tmp_path):
        (tmp_path / "lock").write_text("")  # as a run leaves it that has just begun
        with pytest.raises(UserError, match=r"another run is in it \(unknown\); stop"):
            directory.locked(tmp_path).__enter__()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*file/run: cannot be written \(Not a dir"):
        directory.locked(tmp_path / "file/run").__enter__()


def test_a_changed_field_needs_leave(tmp_path, tiny_config, caplog):
    directory.bind_config(tmp_path, tiny_config, ["a", "b"])
    tiny_config.optim.lr, tiny_config.seed = 0.5, 3
    with pytest.raises(UserError, match=r"optim.lr: 0.001 -> 0.5; seed: 0 -> 3.*--allow-config-ch"):
        directory.bind_config(tmp_path, tiny_config, ["a", "b"])
    with pytest.raises(UserError, match=r"\(seed: 0 -> 3\).*--allow-config-change=seed$"):
        directory.bind_config(tmp_path, tiny_config, ["a", "b"], ["optim.lr"])
    with pytest.raises(UserError, match=r"--allow-config-change=sed: no such field"):
        directory.bind_config(tmp_path, tiny_config, ["a", "b"], ["sed"])
    directory.bind_config(tmp_path, tiny_config, ["a", "b"], ["optim.lr", "seed"])
    assert "optim.lr: 0.001 -> 0.5" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3
    assert read_lines(tmp_path / "history.jsonl")[0]["event"] == "config changed"
    directory.bind_config(tmp_path, tiny_config, ["a", "b"], ["optim.lr"])  # the same command again


def test_a_field_that_the_run_is_too_old_to_have_is_no_change_at_its_default(tiny_config):
    old = to_json(tiny_config)
    del old["train"]["max_bad_steps"], old["mesh"], old["data"]["skip_unreadable"]
    assert changes(old, to_json(tiny_config)) == {}
    tiny_config.train.max_bad_steps = base.get_config().train.max_bad_steps + 1
    (change,) = changes(old, to_json(tiny_config)).values()
    assert change == "train.max_bad_steps: 5 -> 6"
    old["optim"]["nesterov"] = True  # a field that there is no more is one
    assert "optim.nesterov: True -> (no such field)" in changes(old, to_json(tiny_config)).values()


def test_differing_versions_are_told_of(tmp_path, tiny_config, monkeypatch, caplog):
    with pytest.raises(UserError, match="no run is recorded there"):
        directory.recorded_config(tmp_path)
    directory.bind_config(tmp_path, tiny_config, ["a", "b"])
    directory.log_event(tmp_path, "start", step=0, **directory.provenance())
    again = directory.recorded_config(tmp_path)
    assert changes(to_json(tiny_config), to_json(again)) == {}
    assert caplog.text == ""
    monkeypatch.setattr(directory, "_version", lambda name: "0.0" if name == "optax" else "1")
    directory.recorded_config(tmp_path)
    assert "packages.optax: " in caplog.text
    assert "0.0 now: the bits may differ" in caplog.text
