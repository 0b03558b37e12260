"""The command line as a stranger meets it: help, exit codes, one clear line for each mistake."""

import json
import logging
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from deit_jax import __main__ as program
from deit_jax.errors import UserError

ROOT = Path(__file__).parent.parent
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"


def test_a_reader_who_goes_is_no_error(tmp_path):
    """As `| head` does: the output ends, without a traceback or another line."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "deit_jax", "inspect", QUICKSTART, "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def deit(capsys, *argv):
    """Run a command in this process; return its exit code, its output and its error line."""
    try:
        code = program.main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err.strip()


def test_help_answers_at_once_and_loads_no_library():
    code = "import sys; from deit_jax.__main__ import main; main(['--help']); print(*sys.modules)"
    began = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    elapsed = time.perf_counter() - began
    assert "deit COMMAND" in run.stdout
    modules = run.stdout.split()
    assert not {"jax", "flax", "numpy", "absl"} & set(modules)
    assert elapsed < 5  # half a second when the machine is not busy; the modules decide


def test_what_is_logged_stands_above_the_progress_bar(capsys, monkeypatch):
    def train(argv):
        with tqdm(total=2, disable=False) as bar:
            bar.update()
            logging.getLogger("deit_jax").info("a line")

    command = types.SimpleNamespace(main=train)
    found = types.SimpleNamespace(import_module=lambda name: command)
    monkeypatch.setattr(program, "importlib", found)
    code, _, err = deit(capsys, "train")
    assert code == 0
    assert re.search(r"0/2.*\r *\ra line\n\r", err)  # the bar is cleared, and drawn again below


@pytest.mark.parametrize("command", sorted(program.COMMANDS))
def test_every_command_has_help(capsys, command):
    code, out, _ = deit(capsys, command, "--help")
    assert code == 0
    assert f"deit {command}" in out
    assert "Flags:" in out


def test_no_command_is_a_usage_error(capsys):
    assert deit(capsys)[0] == 2
    code, _, err = deit(capsys, "trian")
    assert (code, err) == (2, "deit: unknown command 'trian'; did you mean 'train'?")


def folder(root, classes=("cat", "dog"), images=3):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 255, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    return root


MISTAKES = [
    # (what is added to `deit train --config=quickstart`, exit code, what the line must hold)
    (["--config.bach_size=3"], 2, ["bach_size", "batch_size"]),
    (["--config.batch_size=big"], 2, ["batch_size", "big"]),
    (["--config.optim.lr=0.1", "--confi.x=1"], 2, ["confi.x"]),
    (["stray"], 2, ["stray"]),
    (["--config.batch_size=100"], 1, ["batch_size=100", "multiple of"]),
    (["--config.mixing.group_size=30"], 1, ["mixing.group_size=30", "batch_size=96"]),
    (["--config.mixing.group_size=1"], 1, ["mixing.group_size=1", "must be even"]),
    (["--config.train.eval_batch_size=100"], 1, ["train.eval_batch_size=100", "mesh.data=8"]),
    (["--config.mesh.fsdp=3"], 1, ["mesh.fsdp=3", "number of devices, 8"]),
    (["--config.mesh.data=-1", "--config.mesh.tensor=-1"], 1, ["mesh.tensor=-1", "mesh.data is"]),
    (["--config.mesh.data=4"], 1, ["mesh.data=4", "number of devices, 8"]),
    (["--config.mesh.tensor=0"], 1, ["mesh.tensor=0", "at least 1"]),
    (["--config.mesh.slices=3"], 1, ["mesh.slices=3", "mesh.data=8"]),
    (["--config.mesh.slices=2"], 1, ["mesh.slices=2", "--config.mesh.slices=1"]),
    (["--config.epochs=0"], 1, ["epochs=0.0", "greater than 0"]),
    (["--config.distill.alpha=1.5"], 1, ["distill.alpha=1.5", "between 0 and 1"]),
    (["--config.distill.kind=warm"], 1, ["distill.kind='warm'", "none, soft, hard"]),
    (["--config.optim.name=adam"], 1, ["optim.name='adam'", "adamw"]),
    (["--config.augment.auto=rand-q3"], 1, ["rand-q3"]),
    (["--config.teacher.epochs=0"], 1, ["teacher.weights=''", "--config.teacher.epochs=N"]),
    (["--config.teacher.weights=/nowhere"], 1, ["/nowhere"]),
    (["--config.model.name=deit_tinny"], 1, ["deit_tinny", "deit_tiny"]),
    (["--config.model.num_heads=5"], 1, ["model.width=96", "model.num_heads=5"]),
    (["--config.model.patch_size=64"], 1, ["model.patch_size=64"]),
    (["--config.data.source=digitz"], 1, ["data.source='digitz'", "folder:PATH"]),
    (["--config.data.source=folder:/nowhere"], 1, ["folder:/nowhere", "no such folder"]),
    (["--config.data.source=tfds:imagenet2012"], 1, ["imagenet2012", "not prepared"]),
    (["--config.data.source=tfds:imaginet"], 1, ["imaginet"]),
    (["--config.data.eval_fraction=0"], 1, ["eval_fraction=0"]),
]


@pytest.mark.parametrize(("words", "code", "parts"), MISTAKES, ids=[m[0][-1] for m in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(capsys, tmp_path, words, code, parts):
    workdir = tmp_path / "run"
    got, _, err = deit(capsys, "train", QUICKSTART, f"--workdir={workdir}", *words)
    assert got == code, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("deit train: ")
    for part in parts:
        assert part in err
    assert not workdir.exists()


BUCKET = "hdfs://bucket/x"
OUT_OF_REACH = [  # (words, what the line begins with)
    (["train", QUICKSTART, f"--workdir={BUCKET}"], "--workdir="),
    (["train", f"--reproduce={BUCKET}"], "--reproduce="),
    (["train", QUICKSTART, "--workdir=x", f"--config.data.dir={BUCKET}"], "--config.data.dir="),
    (
        ["train", QUICKSTART, "--workdir=x", f"--config.data.source=wds:{BUCKET}"],
        "--config.data.source=wds:",
    ),
    (
        ["train", QUICKSTART, "--workdir=x", f"--config.teacher.weights=a,{BUCKET}"],
        "--config.teacher.weights=a,",
    ),
    (["eval", f"--workdir={BUCKET}"], "--workdir="),
    (["report", f"--workdir=a,{BUCKET}"], "--workdir="),
    (["predict", f"--weights={BUCKET}", "x.jpg"], "--weights="),
    (["predict", "--weights=x", BUCKET], "argument="),
    (["convert", BUCKET, "x.pth"], "argument="),
    (["tape", "info", BUCKET], "argument="),
    (["inspect", QUICKSTART, f"--out={BUCKET}"], "--out="),
]


@pytest.mark.parametrize(
    ("words", "start"), OUT_OF_REACH, ids=[" ".join(w) for w, _ in OUT_OF_REACH]
)
def test_a_place_out_of_reach_is_one_line_and_writes_nothing(
    capsys, tmp_path, monkeypatch, words, start
):
    monkeypatch.chdir(tmp_path)
    code, _, err = deit(capsys, *words)
    line = f"deit {words[0]}: {start}{BUCKET}: hdfs:// is not understood; give the path"
    assert err.startswith(line), err
    assert (code, len(err.splitlines())) == (2, 1)
    assert os.listdir() == []


def test_missing_flags_and_files(capsys, tmp_path):
    for words, code, part in (
        (["train", QUICKSTART], 2, "--workdir=… is missing"),
        (["train", f"--workdir={tmp_path}"], 2, "--config=… is missing"),
        (["train", "--config=nowhere.py", f"--workdir={tmp_path}/x"], 2, "nowhere.py"),
        (["train", f"{QUICKSTART}:a=1", f"--workdir={tmp_path}/x"], 2, "get_config"),
        (["eval", QUICKSTART], 2, "--workdir=DIR or --weights=W"),
        (["eval", QUICKSTART, f"--workdir={tmp_path}"], 1, f"{tmp_path}"),
        (["eval", f"--workdir={tmp_path}"], 1, "no run is there"),
        (["eval", "--weights=w.pth"], 2, "--config=FILE"),
        (["predict", "--weights=/nowhere"], 2, "no image"),
        (["predict", "--weights=/nowhere", "x.jpg"], 1, "/nowhere"),
        (["predict", "x.jpg"], 2, "--weights"),
    ):
        got, _, err = deit(capsys, *words)
        assert got == code, err
        assert part in err
        assert len(err.splitlines()) == 1, err


def test_debug_shows_the_traceback():
    words = ["--config.data.source=folder:/nowhere", "--workdir=/tmp/never", "--debug"]
    with pytest.raises(UserError, match="no such folder"):
        program.main(["train", QUICKSTART, *words])


def tiny_words(workdir, source):
    """Return the quickstart cut down to one epoch of a few steps on `source`."""
    return [
        "train",
        QUICKSTART,
        f"--workdir={workdir}",
        f"--config.data.source=folder:{source}",
        "--config.epochs=1",
        "--config.teacher.epochs=1",
        "--config.batch_size=32",
        "--config.model.depth=1",
        "--config.model.width=12",
        "--config.teacher.model.widths=(8, 16)",
        "--config.teacher.model.depths=(1, 1)",
        "--config.teacher.model.stem_width=8",
    ]


@pytest.mark.slow
def test_quickstart_trains_on_a_folder_of_photographs(capsys, tmp_path):
    """Real photographs in, teacher and student trained, evaluated, asked about one of them."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    photographs = {
        "cat": [data.chelsea()],
        "coffee": [data.coffee()],
        "scene": load_sample_images().images,
    }
    root = tmp_path / "photographs"
    for name, images in photographs.items():
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            for j, box in enumerate([(0, 0, 250, 250), (30, 20, 290, 260), (60, 40, 300, 299)]):
                Image.fromarray(image).crop(box).save(root / name / f"{i}{j}.jpg")
    workdir = tmp_path / "run"
    code, out, err = deit(capsys, *tiny_words(workdir, root), "--json")
    assert code == 0, err
    results = json.loads(out)
    assert results == json.loads((workdir / "results.json").read_text())
    assert {"teacher", "cls", "dist", "fused"} <= set(results)
    assert json.loads((workdir / "classes.json").read_text()) == ["cat", "coffee", "scene"]

    code, out, err = deit(capsys, "eval", *tiny_words(workdir, root)[1:4], "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said.pop("input")["image_size"] == 32
    assert said == results
    code, again, err = deit(capsys, "eval", f"--workdir={workdir}", "--json")  # on its own config
    assert code == 0, err
    assert again == out

    photograph = root / "cat" / "00.jpg"
    code, out, err = deit(capsys, "predict", f"--weights={workdir}", "--topk=2", photograph)
    assert code == 0, err
    assert out.splitlines()[0] == str(photograph)
    assert len(out.splitlines()) == 3

    other = folder(tmp_path / "two")
    words = [f"--config.data.source=folder:{other}", f"--config.teacher.weights={workdir}/teacher"]
    code, _, err = deit(capsys, "train", QUICKSTART, f"--workdir={tmp_path}/new", *words)
    assert code == 1
    assert "knows 3 classes" in err
    assert "has 2" in err


def test_an_unreadable_image_stops_with_its_name(capsys, tmp_path):
    root = folder(tmp_path / "images", images=8)
    broken = root / "dog" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    code, _, err = deit(capsys, *tiny_words(tmp_path / "run", root))
    assert code == 1
    assert str(broken) in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.slow
def test_training_imports_no_tensorflow(tmp_path):
    """A fresh process has trained without it. (tensorboardX imports torch where it finds one.)"""
    root = folder(tmp_path / "images", images=4)
    code = (
        "import sys\n"
        "from deit_jax.__main__ import main\n"
        f"code = main({tiny_words(tmp_path / 'run', root)!r})\n"
        "assert 'tensorflow' not in sys.modules\n"
        "sys.exit(code)"
    )
    flags = "--xla_backend_optimization_level=0"  # one device, quick to compile for
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert "top-1 %" in run.stdout
    assert str(tmp_path / "run" / "results.json") in run.stdout


def test_flags_may_be_written_with_dashes(capsys, tmp_path):
    words = [QUICKSTART, f"--workdir={tmp_path}/a-b", "--num-processes=x"]
    code, _, err = deit(capsys, "train", *words)
    assert code == 2
    assert "num_processes" in err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            [QUICKSTART, "--config.optim.lrr=1"],
            "--config.optim.lrr: no such field; did you mean optim.lr? "
            "configs/base.py lists them all",
        ),
        (
            [f"--config={ROOT}/configs/deit.py:variant=smal"],
            f"flag --config={ROOT}/configs/deit.py:variant=smal: "
            "variant=smal: choose tiny, small or base",
        ),
        (
            ["--config=nowhere.py"],
            f"--config=nowhere.py: no such file below {Path.cwd()}, nor among those of deit_jax "
            "(base.py, deit.py, deit3.py, deit_finetune384.py, deit_transfer.py, finetune.py, "
            "quickstart.py, teacher.py)",
        ),
    ],
)
def test_mistakes_in_a_config_are_told_without_their_traceback(capsys, tmp_path, words, line):
    code, _, err = deit(capsys, "train", f"--workdir={tmp_path}/x", *words)
    assert (code, err) == (2, f"deit train: {line}")


def test_one_class_is_no_task(capsys, tmp_path):
    root = folder(tmp_path / "images", classes=("cat",))
    code, _, err = deit(capsys, *tiny_words(tmp_path / "run", root))
    assert code == 1
    assert "only one class" in err
    assert not (tmp_path / "run").exists()
