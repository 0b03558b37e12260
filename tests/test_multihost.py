"""Real processes over loopback: any number of them trains the same run, and they end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from deit_jax.data.order import EpochOrder
from deit_jax.data.sources.registry import open_dataset
from deit_jax.storage import read_lines
from deit_jax.train.run import train
from deit_jax.workdir.saved_run import load_run
from tests.test_tape import array
from tests.tiny import make_tiny_config

TAPE = ("labels", "recorded")
ROOT = Path(__file__).parent.parent
TINY = """
from tests.tiny import make_tiny_config

def get_config():
    c = make_tiny_config()
    c.model.depth = 1
    c.train.save_every_epochs = 0.2  # every step
    c.optim.eps = 1e-4  # Adam's first steps are signs: tame rounding around 0
    return c
"""


@pytest.fixture
def words(tmp_path):
    """Return the flag of a small config's file."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return [f"--config={path}"]


def start_all(count, workdir, words):
    """Start the processes of one run, two devices each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    flags = ["--multihost", f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    # Unoptimised programs: compiling them is what the processes mostly do.
    flags_of_xla = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags_of_xla}
    command = [sys.executable, "-m", "deit_jax", "train", *words, f"--workdir={workdir}", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=environment, **pipes)
        for i in range(count)
    ]


def finish(*processes):
    outputs = [p.communicate(timeout=400) for p in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
    return outputs


def records(workdir):
    """Return the metrics of training steps; none before the file is there."""
    path = workdir / "metrics.jsonl"
    return [r for r in read_lines(path) if "loss" in r] if path.exists() else []


def wait_for(ready, *processes):
    deadline = time.monotonic() + 300
    while not ready():
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_on_four_processes_ends_on_two_as_on_one(words, tmp_path):
    """Four record their teacher's answers as one did, from whose label tape two then go on."""
    one, many = tmp_path / "one", tmp_path / "many"
    config = make_tiny_config()
    config.model.depth, config.optim.eps, config.teacher.tape = 1, 1e-4, "record"
    train(config, one)
    words = [*words, f"--config.teacher.weights={one / 'teacher'}"]
    four = start_all(4, many, [*words, "--config.teacher.tape=record"])
    wait_for(lambda: (many / "checkpoints" / "3").is_dir(), *four)
    four[3].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for process in four:
        process.communicate(timeout=60)
        assert process.returncode != 0  # the others notice, and none hangs
    assert time.monotonic() - killed < 45
    begun = max(int(p.name) for p in (many / "checkpoints").glob("[0-9]*"))

    tapes = {name: [array(run / "tape", name) for run in (one, many)] for name in TAPE}
    assert (tapes["recorded"][0][:, 0] == 0).all()
    for whole, cut_off in tapes.values():  # claimed before the state that goes on from there
        np.testing.assert_array_equal(cut_off[:begun], whole[:begun])

    words += ["--config.teacher.tape=replay", f"--config.teacher.tape_path={one / 'tape'}"]
    outputs = finish(*start_all(2, many, words))
    assert f"continuing at step {begun} of 10" in outputs[0][1]
    assert "the teacher's answers come from this label tape" in outputs[0][1]
    assert [r["step"] for r in records(many)] == list(range(1, 11))
    for a, b in zip(records(one), records(many), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    states = [load_run(run) for run in (one, many)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        *(s.variables["params"] for s in states),
    )
    results = [json.loads((run / "results.json").read_text()) for run in (one, many)]
    assert results[0].keys() - results[1].keys() == {"teacher"}  # who was not asked, is not scored
    (out0, _), (out1, err1) = outputs
    assert "top-1 %" in out0
    assert "top-1" not in out1  # only process 0 speaks (but for the transport itself)
    assert "step" not in err1


def grey_images(root, **counts):
    """Write so many images for each split, in the classes a and b."""
    for split, count in counts.items():
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 9 * i, np.uint8)).save(path)


def test_one_process_that_fails_ends_all_with_its_message(words, tmp_path):
    """A file that only the second process reads, in its half of the first batch, is no image."""
    grey_images(tmp_path / "images", train=16, val=4)
    source = open_dataset(data_config(tmp_path / "images")).train
    order = EpochOrder(16, batch_size=16, repeats=3, seed=0)
    slots = [order.slot(position) for position in range(16)]
    only_second = min(set(slots[8:]) - set(slots[:8]))
    broken = Path(source.describe(int(order.shuffled()[only_second])))
    broken.write_bytes(b"not an image")
    words += [
        f"--config.data.source=folder:{tmp_path / 'images'}",
        "--config.data.train_split=train",
        "--config.data.eval_split=val",
        "--config.batch_size=16",
        "--config.distill.kind=none",
    ]
    processes = start_all(2, tmp_path / "run", words)
    (_, err0), (_, err1) = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [1, 1]
    assert f"deit train: {broken}" in err1
    assert f"deit train: process 1 ended the run: {broken}" in err0


@pytest.mark.slow
def test_two_processes_count_the_broken_images_of_both(words, tmp_path):
    """Rows 0 … 7 of the one batch are the first's, 8 … 15 the second's; both have broken ones."""
    grey_images(tmp_path / "images", train=16, val=14)
    broken = sorted((tmp_path / "images" / "val").rglob("*.png"))
    broken = [broken[i] for i in (2, 9, 12)]
    for path in broken:
        path.write_bytes(b"not an image")
    words += [
        f"--config.data.source=folder:{tmp_path / 'images'}",
        "--config.data.train_split=train",
        "--config.data.eval_split=val",
        "--config.data.skip_unreadable=True",
        "--config.batch_size=16",
        "--config.train.eval_batch_size=16",
        "--config.epochs=1",
        "--config.optim.warmup_epochs=0.5",
        "--config.distill.kind=none",
    ]
    outputs = finish(*start_all(2, tmp_path / "run", words))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["examples"], results["unreadable"]) == (11, 3)
    assert results["cls"]["top5"] == 100  # of two classes, whatever it answers
    for path, who in zip(broken, (0, 1, 1), strict=True):
        assert str(path) in outputs[who][1]


@pytest.mark.slow
def test_two_processes_rank_the_examples_of_both(words, tmp_path):
    """Several labels an image: every process has the mean average precision of one alone."""
    rng, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    rows = []
    for i in range(48):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(images / f"{i}.png")
        rows.append(f"{i}.png,{'|'.join(name for name in 'abcde' if rng.random() < 0.4)}")
    (images / "labels.csv").write_text("\n".join(["file,labels", *rows]))
    words += [
        f"--config.data.source=folder:{images}",
        f"--config.data.labels={images / 'labels.csv'}",
        "--config.data.multi_label=True",
        "--config.data.eval_fraction=0.6",
        "--config.loss.kind=binary",
        "--config.loss.smoothing=0.0",
        "--config.loss.class_weights=balanced",
        "--config.batch_size=16",
        "--config.train.eval_batch_size=16",
        "--config.epochs=2",
        "--config.optim.warmup_epochs=0.5",
        "--config.distill.kind=none",
    ]
    finish(*start_all(2, tmp_path / "two", words))
    finish(*start_all(1, tmp_path / "one", words))
    two, one = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("two", "one"))
    assert two["examples"] == one["examples"] == 29
    for head in ("cls", "fused"):
        assert set(two[head]["AP"]) == set("abcde")
        np.testing.assert_allclose(two[head]["mAP"], one[head]["mAP"], rtol=1e-3)
        for name, value in two[head]["AP"].items():
            np.testing.assert_allclose(value, one[head]["AP"][name], rtol=0.05)


def data_config(folder):
    c = make_tiny_config().data
    c.source, c.train_split, c.eval_split = f"folder:{folder}", "train", "val"
    return c
