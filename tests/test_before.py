"""What the version before the rooms left on disk is resumed, replayed and read as it was then.

before/run.tar.xz holds a run that was killed after its fourth step, two label tapes, weight files
in every format, and what that version made of them all in the end; before/make.py made it. Whatever
only reads must give the same bits. Training gives the same bits with the same compiler on a
processor of the same kind, and elsewhere the same course up to rounding.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jaxlib
import numpy as np
import pytest

from deit_jax.storage import read_json, read_lines
from deit_jax.train.tape.tape import Tape
from deit_jax.weights import readers
from deit_jax.weights.load import open_model

ROOT = Path(__file__).parent.parent
ARCHIVE = ROOT / "tests" / "before" / "run.tar.xz"
TRAIN = """
import json, pathlib, sys
from deit_jax.config.serialize import from_json
from deit_jax.train import run
run._draw = lambda trainer, results: None
folder = pathlib.Path(sys.argv[1])
config = from_json(json.loads((folder / "run/config.json").read_text()))
for kind in ("hard", "soft"):
    c = config.copy_and_resolve_references()
    c.distill.kind, c.teacher.tape = kind, "replay"
    c.teacher.tape_path = str(folder / f"tape_{kind}")
    if kind == "soft":
        c.distill.tau, c.teacher.tape_top_k = 3.0, 4
    run.train(c, folder / kind)
run.train(config, folder / "run")
"""


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Unpack what is there."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def facts(before):
    return json.loads((before / "facts.json").read_text())


def digest(tree) -> str:
    total = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        array = np.ascontiguousarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n"
        total.update(name.encode())
        total.update(array.tobytes())
    return total.hexdigest()


def same_machine(facts) -> bool:
    """Return whether the compiler makes the very program here that it made then."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return facts["jaxlib"] == jaxlib.__version__ and facts["cpu"] in names


def numbers(path: Path) -> list[dict]:
    return [r for r in read_lines(path) if "loss" in r]


def assert_same_course(now: Path, then: Path, exact: bool) -> None:
    """Compare two metrics.jsonl: to the bit, or up to what another processor rounds."""
    if exact:
        assert now.read_bytes() == then.read_bytes()
    ours, theirs = numbers(now), numbers(then)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for key in ("loss", "loss_label", "loss_teacher", "lr", "grad_norm"):
        expected = [r[key] for r in theirs]
        np.testing.assert_allclose([r[key] for r in ours], expected, rtol=2e-3, err_msg=key)


def test_weights_of_runs_and_files_are_read_to_the_bit(before, facts):
    run = open_model(before / "run")
    assert run.run.step == facts["step"]
    assert digest(run.variables["params"]) == facts["run"]["params"]
    assert digest(open_model(before / "run/teacher").variables) == facts["run"]["teacher"]
    for name in ("timm.safetensors", "huggingface"):
        assert digest(open_model(before / name).variables["params"]) == facts["files"][name]
    assert digest(dict(readers.read(before / "deit.pth"))) == facts["files"]["deit.pth"]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_label_tapes_are_read_to_the_bit(before, facts, kind):
    tape = Tape.open(before / f"tape_{kind}")
    assert len(tape) == 10
    targets = [tape.target(step, range(16)) for step in range(len(tape))]
    assert digest(targets) == facts["tapes"][kind]


@pytest.fixture(scope="module")
def trained(before, tmp_path_factory):
    """Go on with the run, and train students from both tapes, as `deit train` does: on one device.

    In a process of its own, as the tests' eight devices and their compiler's options change bits.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    folder = shutil.copytree(before, tmp_path_factory.mktemp("trained") / "folder")
    command = [sys.executable, "-c", TRAIN, str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(trained, facts):
    exact = same_machine(facts)
    assert_same_course(trained / "run/metrics.jsonl", trained / "metrics.jsonl", exact)
    final, results = open_model(trained / "run"), read_json(trained / "run/results.json")
    if exact:
        assert results == facts["results"]
        assert digest(final.variables["params"]) == facts["final"]["params"]
        assert digest(final.run.ema) == facts["final"]["ema"]
    assert results["step"] == 10
    assert results["examples"] == facts["results"]["examples"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_student_trains_from_a_tape_as_it_did(trained, facts, kind):
    """From labels that is the course of the run with its teacher; from logits one of its own."""
    then = trained / ("metrics.jsonl" if kind == "hard" else "metrics_soft.jsonl")
    assert_same_course(trained / f"{kind}/metrics.jsonl", then, same_machine(facts))
