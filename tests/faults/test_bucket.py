"""A workdir in a bucket keeps what one on a disk keeps: killed, contested, on a bad line."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from deit_jax import storage
from deit_jax.errors import EXIT_CODE
from deit_jax.storage import gcs, to_path
from tests.emulator import BadLine, Emulator, environment, free_port
from tests.faults import driver
from tests.faults.test_stopping import steps, until
from tests.test_cli import deit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    server = Emulator(tmp_path_factory.mktemp("gcs"))
    yield server
    server.kill()


OF_ONE_RUN = ("name", "history", "curves", "config")  # curves also hold times


def run_in(server, name, url=None, **more):
    """Return the folder of the emulator that is gs://bucket/NAME, known to the driver."""
    workdir = server.folder / name
    driver.PLACES[workdir] = (f"gs://bucket/{name}", {**environment(url or server.url), **more})
    return workdir


def log(workdir):
    return driver.log_of(workdir).read_text()


def test_killed_at_ten_random_moments_it_ends_with_the_same_bits(folder, emulator):
    workdir = run_in(emulator, "killed")
    hits = driver.torment(workdir, folder / "cache", 40, kills=10, seed=3, at_least=6)
    assert any("saving" in hit["hit"] for hit in hits), hits
    assert driver.differences(folder / "whole", workdir) == []
    starts = [r["step"] for r in driver.history(workdir) if r["event"] == "start"]
    assert starts[-1] > 0  # it went on, rather than anew
    assert not driver.saving(workdir)  # nothing is left of checkpoints that were begun


def test_one_request_in_twenty_fails(folder, emulator):
    """With 429 or 503, a third of these after what was asked was done; and some hang.

    What hangs in gcsfs is not tried again: a save may fail, and a start. The next one goes on.
    """
    line = BadLine(emulator.url, failing=0.05, hanging=0.001, seed=1)
    workdir = run_in(emulator, "bad-line", line.url, DEIT_GCS_TIMEOUT="3")
    for _ in range(5):
        process = driver.start(workdir, folder / "cache", 40)
        if process.wait(400) == 0:
            break
        assert process.returncode == 1
    driver.finish(process, workdir)
    line.close()
    assert line.counts["failed"] > 10, line.counts
    assert driver.differences(folder / "whole", workdir) == []


def test_the_server_ends_and_comes_back(folder, tmp_path):
    server = Emulator(tmp_path / "gcs")
    workdir = run_in(server, "outage")
    process = driver.start(workdir, folder / "cache", 40)
    until(lambda: steps(workdir) >= 10, process)
    server.kill()
    time.sleep(8)
    server.start()
    driver.finish(process, workdir, 400)
    server.kill()
    assert driver.differences(folder / "whole", workdir) == []


def test_told_to_stop_it_saves_and_goes_on(folder, emulator):
    workdir = run_in(emulator, "stopped")
    process = driver.start(workdir, folder / "cache", 40)
    until(lambda: steps(workdir) >= 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_CODE
    said = log(workdir).splitlines()[-1]
    step = int(re.search(r"after step (\d+) of 40", said)[1])
    assert f"saved in gs://bucket/stopped/checkpoints/{step}" in said
    assert (workdir / "checkpoints" / str(step) / "commit_success.txt").exists()
    driver.finish(driver.start(workdir, folder / "cache", 40), workdir)
    assert driver.differences(folder / "whole", workdir) == []


def test_of_two_runs_in_one_workdir_the_second_is_refused(folder, emulator):
    """The first is killed after that; the next start need not wait, as it sees it is gone."""
    workdir = run_in(emulator, "contested")
    first = driver.start(workdir, folder / "cache", 4000)
    until(lambda: steps(workdir) >= 2, first)
    where, env = driver.PLACES[workdir]
    words = [*driver.WORDS, "--config.epochs=800", f"--workdir={where}"]
    second = subprocess.run(
        [sys.executable, "-m", "deit_jax", "train", *words],
        cwd=driver.ROOT,
        env={**driver.environment(folder / "cache"), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == 1
    last = second.stderr.splitlines()[-1]
    assert f"--workdir={where}: another run is in it (process {first.pid} on" in last
    first.kill()
    first.wait()
    third = driver.start(workdir, folder / "cache", 4000)
    until(lambda: len(driver.history(workdir)) > 1, third)
    third.kill()
    third.wait()
    assert "taken over if" not in log(workdir)
    assert [r["event"] for r in driver.history(workdir)] == ["start", "start"]


def test_a_signal_to_one_of_two_processes_saves_once(folder, emulator):
    workdir = run_in(emulator, "two")
    where, env = driver.PLACES[workdir]
    words = [*driver.WORDS, "--config.epochs=40", "--config.distill.kind=none"]
    words += ["--config.train.save_every_epochs=40", "--config.train.eval_every_epochs=40"]
    words += ["--multihost", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    words += [f"--workdir={where}"]
    both = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "deit_jax",
                "train",
                *words,
                f"--process_id={i}",
            ],
            cwd=driver.ROOT,
            env={**driver.environment(folder / "cache"), **env},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    until(lambda: steps(workdir) >= 3, both[0])
    both[1].send_signal(signal.SIGINT)
    errors = [p.communicate(timeout=90)[1] for p in both]
    assert [p.returncode for p in both] == [EXIT_CODE] * 2, errors
    step = steps(workdir)
    assert f"stopped by SIGINT after step {step} of 200" in errors[1]
    assert (workdir / "checkpoints" / str(step) / "commit_success.txt").exists()


def test_every_command_takes_a_run_in_a_bucket(folder, emulator, monkeypatch, capsys, tmp_path):
    """And says of it what it says of the same run on a disk."""
    workdir = run_in(emulator, "finished")
    driver.finish(driver.start(workdir, folder / "cache", 40), workdir)
    assert driver.differences(folder / "whole", workdir) == []
    there, whole = "gs://bucket/finished", folder / "whole"
    for name, value in environment(emulator.url).items():
        monkeypatch.setenv(name, value)
    gcs._client.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "x.png")
    storage.backend(to_path(there)).write(
        to_path("gs://bucket/photos/x.png"), (tmp_path / "x.png").read_bytes()
    )
    said = {}
    for run, photo in ((there, "gs://bucket/photos/x.png"), (whole, tmp_path / "x.png")):
        for words in (
            ("eval", f"--workdir={run}", f"--config={driver.ROOT}/configs/quickstart.py"),
            ("analyze", f"--workdir={run}"),
            ("inspect", f"--workdir={run}"),
            ("predict", f"--weights={run}", str(photo)),
        ):
            code, out, err = deit(capsys, *words)
            assert code == 0, err
            said[run, words[0]] = out.replace(str(run), "RUN").replace(str(photo), "x")
        (figures,) = json.loads(said[run, "analyze"])["runs"]
        said[run, "analyze"] = {k: v for k, v in figures.items() if k not in OF_ONE_RUN}
    for command in ("eval", "analyze", "inspect", "predict"):
        assert said[there, command] == said[whole, command]
    for words in (
        ("report", f"--workdir={there}", "--out=gs://bucket/report.html"),
        ("convert", there, "gs://bucket/finished.safetensors"),
        ("convert", f"{there}/teacher", "gs://bucket/teacher", "--to=deit_jax"),
    ):
        code, _, err = deit(capsys, *words)
        assert code == 0, err
    assert "<svg" in (emulator.folder / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    student = [*driver.WORDS, "--config.epochs=1", "--config.init.weights=" + there]
    student += ["--config.teacher.weights=gs://bucket/teacher"]
    student += ["--config.teacher.tape_path=gs://bucket/tape"]
    for use in ("record", "replay"):
        words = [*student, f"--config.teacher.tape={use}", f"--workdir=gs://bucket/{use}"]
        code, _, err = deit(capsys, "train", *words)
        assert code == 0, err
    losses = [driver.records(emulator.folder / use) for use in ("record", "replay")]
    assert losses[0] == losses[1]
    code, out, err = deit(capsys, "tape", "info", "gs://bucket/tape")
    assert code == 0, err
    assert "gs://bucket/tape" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "x.png"]


def test_a_damaged_checkpoint_is_set_aside(folder, emulator):
    workdir = run_in(emulator, "damaged")
    process = driver.start(workdir, folder / "cache", 40)
    until((workdir / "checkpoints" / "20" / "commit_success.txt").exists, process)
    process.kill()
    process.wait()
    whole = (workdir / "checkpoints").glob("[0-9]*/commit_success.txt")
    newest = max((path.parent for path in whole), key=lambda path: int(path.name))
    victim = max((newest / "default").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    driver.finish(driver.start(workdir, folder / "cache", 40), workdir)
    assert f"checkpoint {newest.name} is damaged" in log(workdir)
    assert (workdir / "checkpoints" / f"damaged-{newest.name}" / "sha256.json").exists()
    assert driver.differences(folder / "whole", workdir) == []


@pytest.mark.parametrize(
    ("place", "env", "says"),
    [
        ("gs://no-such-bucket/run", {}, "there is no bucket gs://no-such-bucket"),
        (
            "gs://bucket/run",
            {"STORAGE_EMULATOR_HOST": "", "GOOGLE_APPLICATION_CREDENTIALS": "", "HOME": "/none"},
            "no credentials for Google Cloud on this machine; gcloud auth",
        ),
    ],
    ids=["no bucket", "no credentials"],
)
def test_what_is_wrong_with_the_place_is_one_line(place, env, says, emulator, folder):
    words = [*driver.WORDS, f"--workdir={place}"]
    env = {**driver.environment(folder / "cache"), **environment(emulator.url), **env}
    env = {key: value for key, value in env.items() if value}
    done = subprocess.run(
        [sys.executable, "-m", "deit_jax", "train", *words],
        cwd=driver.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert says in line
    assert place in line
    assert not os.path.exists(driver.ROOT / "gs:")
