"""Damaged checkpoints, full, read-only and vanished disks."""

import contextlib
import os
import random
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.errors import UserError
from deit_jax.step.state import TrainState
from deit_jax.storage import read_lines
from deit_jax.workdir import checksums
from deit_jax.workdir.checkpoints import Checkpointer
from deit_jax.workdir.metrics import Lines
from deit_jax.workdir.saved_run import _newest_good


def make_state(number, size=50_000):
    params = {"w": jax.random.normal(jax.random.key(number), (size,)), "b": {"c": jnp.ones(3)}}
    return TrainState(jnp.int32(number), params, {}, (params,), None)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture
def saved(tmp_path):
    """Return a workdir with checkpoints 1, 2 and 3."""
    saver = Checkpointer(tmp_path, keep=3)
    for number in (1, 2, 3):
        saver.save(number, jax.device_put(make_state(number)), None)
    saver.close()
    return tmp_path


def array_file(directory):
    return max((p for p in directory.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, os.unlink])
@pytest.mark.parametrize("which", [array_file, lambda d: d / "default/_METADATA"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(saved, harm, which, caplog):
    harm(which(saved / "checkpoints/3"))
    saver, state = Checkpointer(saved, keep=3), jax.device_put(make_state(2))
    events = []
    saver.notify_with(lambda event, **facts: events.append((event, facts["step"])))
    restored = saver.restore(abstract(state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    names = {p.name for p in (saved / "checkpoints").iterdir()}
    assert names == {"1", "2", "damaged-3"}
    assert "checkpoint 3 is damaged" in caplog.text
    assert events == [("damaged checkpoint", 3)]
    saver.save(3, jax.device_put(make_state(3)), None)  # as training comes by there again
    saver.close()
    assert saver.latest_step == 3
    assert checksums.problem(saved / "checkpoints/3") is None


def test_orbax_alone_does_not_see_a_flipped_bit_in_an_array(saved):
    """Why there are checksums. If this fails one day, they may go."""
    state = jax.device_put(make_state(3))
    flip_a_bit(array_file(saved / "checkpoints/3"))
    (saved / "checkpoints/3" / checksums.NAME).unlink()
    saver = Checkpointer(saved, keep=3)
    try:
        restored = saver.restore(abstract(state))
        assert not np.array_equal(restored.params["w"], state.params["w"]) or not np.array_equal(
            restored.opt_state[0]["w"], state.params["w"]
        )
    finally:
        saver.close()


def test_without_a_good_checkpoint_nothing_is_touched(saved):
    for number in (1, 2, 3):
        flip_a_bit(array_file(saved / f"checkpoints/{number}"))
    before = sorted(saved.rglob("*"))
    saver = Checkpointer(saved, keep=3)
    with pytest.raises(UserError, match=r"no good checkpoint \(3: .*; 2: .*; 1: .*nothing was"):
        saver.restore(abstract(jax.device_put(make_state(3))))
    saver.close()
    assert sorted(saved.rglob("*")) == before
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        _newest_good(saved / "checkpoints", [1, 2, 3])


# Of the arrays that Orbax still reads when one does not fit, nobody awaits the others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_state_of_another_shape_is_not_taken_for_damage(saved):
    saver = Checkpointer(saved, keep=3)
    with pytest.raises(UserError, match=r"checkpoints/3: does not fit this config"):
        saver.restore(abstract(jax.device_put(make_state(3, size=40_000))))
    saver.close()
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_a_checkpoint_from_before_health_was_kept_is_restored(tmp_path):
    state = jax.device_put(make_state(4))
    saver = Checkpointer(tmp_path, keep=1)
    saver.save(4, state.replace(health=None), None)
    saver.settle()
    restored = saver.restore(abstract(state))
    saver.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_checkpoint_on_request_does_not_push_out_a_planned_one(tmp_path):
    saver = Checkpointer(tmp_path, keep=1)
    for number, interim in ((1, False), (2, True), (3, True)):
        saver.save(number, jax.device_put(make_state(number)), None, interim=interim)
    saver.close()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}


@contextlib.contextmanager
def mounted(path, size):
    """Mount a small file system in memory, where that is allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], capture_output=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax, likewise
def test_on_a_full_disk_training_goes_on_and_saves_again_once_there_is_room(tmp_path, caplog):
    with mounted(tmp_path / "small", "3m") as disk:
        saver = Checkpointer(disk, keep=2)
        saver.save(1, jax.device_put(make_state(1)), None)
        saver.settle()
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            for _ in range(3000):
                file.write(bytes(1000))
        for number in (2, 3):  # tries each time
            saver.save(number, jax.device_put(make_state(number)), None)
            saver.settle()
            assert saver.latest_step == 1
            assert f"step {number} could not be saved" in caplog.text
            assert [p.name for p in (disk / "checkpoints").iterdir()] == ["1"]
        with pytest.raises(UserError, match=r"step 3 could not be saved, the last good .* is 1"):
            saver.require_saved(3)
        lines = Lines(disk / "metrics.jsonl", []) if filler.unlink() is None else None
        with contextlib.suppress(OSError), filler.open("wb") as file:
            for _ in range(3000):
                file.write(bytes(1000))
        for number in range(2000):
            lines.append({"step": number})
        assert "the disk is full" in caplog.text
        filler.unlink()
        lines.append({"step": 2000})
        lines.close()
        records = read_lines(disk / "metrics.jsonl")
        assert [r["step"] for r in records] == list(range(2001))
        saver.save(4, jax.device_put(make_state(4)), None)
        saver.require_saved(4)
        saver.close()
        assert checksums.problem(disk / "checkpoints/4") is None


def test_a_disk_that_turns_read_only_or_vanishes_is_told_of(tmp_path):
    with mounted(tmp_path / "disk", "8m") as disk:
        saver = Checkpointer(disk, keep=2)
        saver.save(1, jax.device_put(make_state(1)), None)
        saver.settle()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UserError, match=r"step 2 cannot be saved .*Read-only file system"):
            saver.save(2, jax.device_put(make_state(2)), None)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        with pytest.raises(UserError, match=r"step 3 cannot be saved .*No such file"):
            saver.save(3, jax.device_put(make_state(3)), None)
        assert list(disk.iterdir()) == []  # nothing was written where the disk used to be
        saver.close()
