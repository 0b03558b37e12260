"""Nothing but a command's own lines on stderr, in a fresh process with a fresh home."""

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit_jax import __main__ as program

ROOT = Path(__file__).parent.parent
CLASSES = ("cat", "猫 $x$")
SMALL = (
    *("--config.epochs=2", "--config.teacher.epochs=1", "--config.batch_size=32"),
    *("--config.model.depth=1", "--config.model.width=12", "--config.teacher.model.widths=(8,16)"),
    *("--config.teacher.model.depths=(1,1)", "--config.teacher.model.stem_width=8"),
)
OURS = (  # what a training says, line by line
    r"folder:\S+: \d+ images to train on .*",
    r"2 classes: cat, 猫 \$x\$; .*",
    r"no two files are the same",
    r"\w+: [\d.]+ M parameters; .*",
    r"step \d+/\d+: top-1 .*",
    r"picture of the run: \S+",
)


@pytest.fixture
def deit(tmp_path):
    """Return a function that runs a command as a stranger does: (exit code, stderr)."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.jpg")
    kept = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT", "TEMP", "LD_LIBRARY_PATH")
    home = {"HOME": str(tmp_path / "home"), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment = {k: v for k in kept if (v := os.environ.get(k))} | home
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}

    def run(*words):
        done = subprocess.run(
            [sys.executable, "-m", "deit_jax", *map(str, words)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=tmp_path,
            env=environment,
        )
        return done.returncode, done.stderr

    return run


CONFIG = ("--config=quickstart.py", "--config.data.source=folder:images", *SMALL)


def test_a_sheet_in_a_fresh_home_is_drawn_without_a_word(deit, tmp_path):
    """Matplotlib builds its list of fonts, and none has the second class's letters."""
    assert deit("inspect", *CONFIG, "--out=sheet.png") == (0, "")
    assert Image.open(tmp_path / "sheet.png").size == (1600, 1750)


@pytest.mark.slow
def test_a_training_says_its_own_lines_and_what_reads_it_none(deit, tmp_path):
    code, err = deit("train", *CONFIG, "--workdir=run")
    assert code == 0, err
    for line in err.splitlines():
        assert any(re.fullmatch(pattern, line) for pattern in OURS), line
    assert len(err.splitlines()) == 9
    assert deit("eval", "--workdir=run") == (0, "")
    assert deit("predict", "--weights=run", "images/cat/0.jpg") == (0, "")
    assert deit("report", "--workdir=run", "--images=4") == (0, "")
    assert deit("convert", "run", "weights.safetensors") == (0, "")
    assert deit("embed", "--weights=weights.safetensors", "--out=e.npy", "images") == (0, "")


@pytest.mark.slow
def test_a_plan_says_nothing_of_the_compiler(deit):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu for this machine")
    assert deit("plan", *CONFIG, "--topology=v5e:2x2") == (0, "")


def test_errors_of_libraries_are_told_and_their_warnings_only_with_debug(tmp_path):
    code = (
        "import logging, sys\n"
        "from deit_jax import __main__ as program\n"
        "program._start_logging('--debug' in sys.argv)\n"
        "logging.basicConfig()\n"
        "other = logging.getLogger('library')\n"
        "other.warning('a warning'), other.error('an error')\n"
        "logging.getLogger('deit_jax').info('ours')\n"
    )
    said = {}
    for words in ((), ("--debug",)):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT
        )
        said[words] = done.stderr.splitlines()
    assert said[()] == ["an error", "ours"]
    assert said[("--debug",)] == ["WARNING:library:a warning", "ERROR:library:an error", "ours"]


def test_a_program_that_logs_keeps_its_handlers():
    before = list(logging.root.handlers)
    assert before  # pytest's
    program._start_logging(False)
    assert logging.root.handlers == before
