"""Which checkpoint of a run is taken, by commands, teachers and starts."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deit_jax.__main__ import main
from deit_jax.errors import UserError
from deit_jax.storage import read_lines
from deit_jax.train import run as run_lib
from deit_jax.train.experiment import prepare
from deit_jax.train.load_teacher import load_teacher
from deit_jax.train.run import starting_weights, train
from deit_jax.train.tape.fingerprint import parameters_sha256
from deit_jax.weights.load import load_variables, open_model
from deit_jax.workdir import checksums
from deit_jax.workdir.saved_run import kept_steps, load_run
from tests.tiny import make_tiny_config

pytestmark = pytest.mark.eight_devices


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train 10 steps, evaluated and saved every second one."""
    workdir = tmp_path_factory.mktemp("which") / "run"
    c = make_tiny_config()
    c.distill.kind = "none"
    c.train.eval_every_epochs = c.train.save_every_epochs = 0.4
    c.train.keep_checkpoints = 10
    drawn, run_lib._draw = run_lib._draw, lambda trainer, results: None
    try:
        train(c, workdir)
    finally:
        run_lib._draw = drawn
    return workdir


def parameters_at(workdir, step, part="params"):
    """Read a checkpoint with Orbax alone."""
    place = workdir / "checkpoints" / str(step) / "default"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(place).item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(place, restore_args=numpy)[part]


def same(a, b):
    leaves = (jax.tree.leaves(a), jax.tree.leaves(b))
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def best_step(workdir):
    """Return the newest of the best evaluations in metrics.jsonl."""
    scores = {
        r["step"]: r["eval/fused.top1"]
        for r in read_lines(workdir / "metrics.jsonl")
        if "eval/fused.top1" in r
    }
    return max(scores, key=lambda s: (scores[s], s))


@pytest.fixture
def better_before(run, tmp_path):
    """Return the run with the figure of its fourth step raised above all."""
    copy = shutil.copytree(run, tmp_path / "copy")
    path = copy / "checkpoints" / "4" / "metrics" / "metrics"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top1": 101.0}))
    checksums.write(copy / "checkpoints" / "4")
    return copy


def test_best_is_that_of_the_recorded_evaluations(run, better_before):
    assert kept_steps(run) == [2, 4, 6, 8, 10]
    assert load_run(run).step == load_run(run, checkpoint="latest").step == 10
    assert load_run(run, checkpoint="best").step == best_step(run)
    assert load_run(better_before, checkpoint="best").step == 4


def test_a_step_is_that_checkpoint(run):
    for chosen in (6, "6"):
        assert same(load_run(run, checkpoint=chosen).variables["params"], parameters_at(run, 6))
    opened = open_model(run, checkpoint=6, ema=True)
    assert same(opened.variables["params"], parameters_at(run, 6, "ema")["params"])


def test_each_mistake_is_one_line(run, better_before, tmp_path):
    with pytest.raises(UserError, match=r"checkpoint=5: not there .*there are 2, 4, 6, 8, 10\. "):
        load_run(run, checkpoint=5)
    with pytest.raises(UserError, match="checkpoint=newest: give latest, best or a step"):
        load_run(run, checkpoint="newest")
    for part in (better_before / "checkpoints" / "4" / "default").rglob("*"):
        if part.is_file():
            part.write_bytes(b"x")
    for chosen in ("best", "4"):
        with pytest.raises(UserError, match=r"4: damaged .*take another of 2, 4, 6, 8, 10"):
            load_run(better_before, checkpoint=chosen)
    main(["convert", str(run), str(tmp_path / "plain"), "--to=deit_jax"])
    with pytest.raises(UserError, match=r"=best: none of those there \(0\) was evaluated"):
        load_run(tmp_path / "plain", checkpoint="best")
    main(["convert", str(run), str(tmp_path / "a.safetensors")])
    with pytest.raises(UserError, match="checkpoint=best is of a run, and this is none"):
        load_variables(tmp_path / "a.safetensors", checkpoint="best")


def test_convert_takes_it(run, better_before, tmp_path, capsys):
    main(["convert", str(better_before), str(tmp_path / "b"), "--to=deit_jax", "--checkpoint=best"])
    assert same(load_run(tmp_path / "b").variables["params"], parameters_at(run, 4))
    words = [str(run), str(tmp_path / "c"), "--to=deit_jax", "--checkpoint=6", "--ema"]
    main(["convert", *words])
    average = parameters_at(run, 6, "ema")["params"]
    assert same(load_run(tmp_path / "c").variables["params"], average)
    capsys.readouterr()
    assert main(["convert", str(run), str(tmp_path / "d"), "--checkpoint=newest"]) == 2
    assert "give latest, best or a step" in capsys.readouterr().err


def test_reports_take_it(better_before, capsys):
    main(["analyze", f"--workdir={better_before}", "--images=20", "--checkpoint=best", "--ema"])
    (figures,) = json.loads(capsys.readouterr().out)["runs"]
    assert (figures["checkpoint_step"], figures["checkpoint_ema"]) == (4, True)
    assert main(["report", f"--workdir={better_before}", "--checkpoint=5"]) == 1
    assert "there are 2, 4, 6, 8, 10" in capsys.readouterr().err


def test_a_start_and_a_teacher_take_it(run, better_before, tmp_path):
    c = make_tiny_config()
    c.init.weights, c.init.checkpoint, c.init.ema = str(better_before), "best", True
    c.teacher.weights, c.teacher.checkpoint = str(better_before), "best"
    experiment, dataset = prepare(c)
    start = starting_weights(experiment, tmp_path, dataset.classes)
    assert same(start["params"], parameters_at(run, 4, "ema")["params"])
    spec = experiment.teacher
    _, params = load_teacher(spec, spec.weights, dataset.classes)
    assert same(params, parameters_at(run, 4))
    c.teacher.checkpoint = "latest"
    spec = prepare(c)[0].teacher
    _, latest = load_teacher(spec, spec.weights, dataset.classes)
    assert parameters_sha256(params) != parameters_sha256(latest)  # a tape knows them by that


REFUSED = [
    ({"init.checkpoint": "best"}, "config.init.checkpoint='best': there is no config.init.weights"),
    ({"init.ema": True}, "config.init.ema=True: there is no config.init.weights"),
    ({"init.checkpoint": "first"}, "config.init.checkpoint=first: give latest, best or a step"),
    ({"teacher.ema": True}, "config.teacher.ema=True: there is no config.teacher.weights"),
    ({"teacher.checkpoint": "best", "distill.kind": "none"}, "config.teacher.checkpoint='best'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_choice_of_nothing_is_refused(changes, message):
    c = make_tiny_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        prepare(c)


def test_a_teacher_trained_first_may_be_its_best():
    c = make_tiny_config()
    c.teacher.checkpoint = "best"
    assert prepare(c)[0].teacher.checkpoint == "best"
