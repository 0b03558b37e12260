"""SIGTERM and SIGINT: finish the step, save, say where, exit with 75, and go on later."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from deit_jax.errors import EXIT_CODE
from tests.faults import driver


def until(true, process, seconds=240):
    """Wait for something to become true while a process runs."""
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < end
        time.sleep(0.01)


def steps(workdir):
    return sum("loss" in r for r in driver.records(workdir))


@pytest.mark.slow
def test_a_signal_saves_and_the_next_start_goes_on(folder):
    workdir, cache = folder / "stopped", folder / "cache"
    for number, reached in ((signal.SIGTERM, 5), (signal.SIGINT, 13)):
        process = driver.start(workdir, cache, 40)
        until(lambda reached=reached: steps(workdir) >= reached, process)
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == EXIT_CODE
        assert time.monotonic() - began < 30
        last = workdir.with_suffix(".log").read_text().splitlines()[-1]
        step = steps(workdir)
        assert f"stopped by {number.name} after step {step} of 40" in last
        assert f"{workdir}/checkpoints/{step}" in last
        assert (workdir / "checkpoints" / str(step)).is_dir()
    # While evaluating: the evaluation is left for the next start.
    process = driver.start(workdir, cache, 40)
    until(lambda: steps(workdir) >= 20 and driver.evaluating(workdir), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_CODE
    driver.finish(driver.start(workdir, cache, 40), workdir)
    assert driver.differences(folder / "whole", workdir) == []
    stops = [r["signal"] for r in driver.history(workdir) if r["event"] == "stopped"]
    assert stops == ["SIGTERM", "SIGINT", "SIGTERM"]


@pytest.mark.slow
def test_signals_while_there_is_nothing_to_save_end_at_once(folder):
    workdir = folder / "early"
    process = driver.start(workdir, folder / "cache", 40)
    until((workdir / "lock").exists, process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == EXIT_CODE
    assert time.monotonic() - began < 3
    assert "nothing to save" in workdir.with_suffix(".log").read_text()


def test_a_second_signal_does_not_wait():
    """Even where the main thread is busy in code that is not Python's."""
    code = (
        "import ctypes, time\n"
        "from deit_jax.parallel import signals\n"
        "with signals.listening() as stop:\n"
        "    stop.armed = True\n"
        "    print('ready', flush=True)\n"
        "    ctypes.PyDLL(None)  # loaded before\n"
        "    ctypes.CDLL(None).sleep(60)\n"
        "    ctypes.CDLL(None).sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert "finishing the step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT, (out, err)
    assert "a second signal, SIGINT" in err
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    words = [*driver.WORDS, "--config.epochs=40", "--config.distill.kind=none"]
    words += ["--config.train.save_every_epochs=40", "--config.train.eval_every_epochs=40"]
    words += ["--config.mixing.prob=0.0", "--config.augment.erase_prob=0.0"]  # compiles faster
    words += ["--multihost", f"--coordinator=localhost:{port}", "--num_processes=2"]
    command = [sys.executable, "-m", "deit_jax", "train", *words, f"--workdir={tmp_path / 'run'}"]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags}
    both = [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            cwd=driver.ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    until(lambda: steps(tmp_path / "run") >= 3, both[0])
    began = time.monotonic()
    both[1].send_signal(signal.SIGINT)
    errors = [p.communicate(timeout=60)[1] for p in both]
    assert time.monotonic() - began < 30
    assert [p.returncode for p in both] == [EXIT_CODE] * 2, errors
    step = steps(tmp_path / "run")
    assert f"stopped by a signal to another process after step {step} of 200" in errors[0]
    assert f"stopped by SIGINT after step {step} of 200" in errors[1]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [str(step)]
